"""An exchange of few rows without flags: what is sent is never 0, so a word that is not 0 has come. Neither fence nor flag is waited for.

Each thread waits for the words of the threads that have its place on the other devices, 4 bytes each by itself, so no order among them and
no store wider than a word needs to be whole. A block's part of lent memory has three buffers of a slot for each rank. Exchange k uses
buffer k % 3 and zeroes the one before, into which the others write again in exchange k + 2. They begin that after their own k + 1 has
ended, which had data of this device's k + 1, so after its kernel of exchange k had ended, zeros and all: block 0 always has a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from jaxserve.pallas_kernels.collectives.mosaic_gpu_all_reduce import UNIT_BYTES, slots_end
from jaxserve.pallas_kernels.collectives.mosaic_gpu_exchange import (
    BLOCKS,
    PATIENCE,
    Place,
    const,
    mgpu,
    plus,
    store_16,
    times,
    utils,
)

BUFFERS = 3
MOST_UNITS = 16  # of 16 bytes a thread, that a block sends
MOST_WORDS = 64  # that a thread waits for at once: they are in registers
MOST_DEVICES = MOST_WORDS // 4
SLOT_BYTES = BLOCKS * MOST_UNITS * UNIT_BYTES
Words = Sequence[Any]


def flagless_end(devices: int) -> int:
    """Where this kernel's part of the lent memory ends."""
    return slots_end(devices) + BUFFERS * devices * SLOT_BYTES


class Flagless:
    """A thread block's exchange.

    What a kernel leaves to the next one is the buffer that is next, and how many units were sent by this one, which is to be zeroed.

    Attributes:
        at_once: how many units may be received at a time.
    """

    def __init__(self, place: Place, devices: int) -> None:
        self.place, self.devices, self.at_once = place, devices, MOST_WORDS // (4 * devices)
        turn = place.load_turn()
        self.buffer, self.used = arith.andi(turn, _word(3)), arith.shrui(turn, _word(2))

    def send(self, mine: Sequence[Words], first: int) -> None:
        """Sends this device's units, from the first one on, to all, itself among them; two zeros in a word as 0 and -0."""
        place, zero = self.place, _word(0)

        def shown(word: Any) -> Any:
            return arith.select(arith.cmpi(arith.CmpIPredicate.eq, word, zero), _word(-(1 << 31)), word)

        sent = [[shown(word) for word in words] for words in mine]
        for base in (*place.lent, place.own):
            to = plus(self._at(base, self.buffer), times(place.rank, SLOT_BYTES))
            for unit, words in enumerate(sent):
                _send(to, words, (first + unit) * UNIT_BYTES)

    def receive(self, units: int, first: int) -> list[list[Words]]:
        """So many units of all ranks, from the first one on, once they are there."""
        numbers = range(first, first + units)
        offsets = [rank * SLOT_BYTES + unit * UNIT_BYTES for rank in range(self.devices) for unit in numbers]
        words = _wait_for_words(self._at(self.place.own, self.buffer), offsets)
        return [words[first : first + units] for first in range(0, len(words), units)]

    def clear(self) -> None:
        """Zeroes what the exchange before used; by every block, as that may have had more rows."""
        before = self._at(self.place.own, _after(_after(self.buffer)))
        for unit in range(MOST_UNITS):
            is_used = arith.cmpi(arith.CmpIPredicate.ult, _word(unit), self.used)
            for rank in range(self.devices):
                store_16(before, [_word(0)] * 4, rank * SLOT_BYTES + unit * UNIT_BYTES, predicate=is_used)

    def end(self, sent: int) -> None:
        """By all threads of every block, with how many units it sent."""
        mgpu.warpgroup_barrier()  # all have read whose turn it is
        self.place.keep_turn(arith.ori(_after(self.buffer), _word(sent << 2)))

    def _at(self, base: Any, buffer: Any) -> Any:
        place, wide = self.place, arith.extui(const(0).type, buffer)
        own = plus(times(place.block, MOST_UNITS * UNIT_BYTES), times(place.thread, 16))
        return plus(base, const(slots_end(self.devices)), times(wide, self.devices * SLOT_BYTES), own)


def _word(number: int) -> Any:
    return mgpu.c(number, ir.IntegerType.get_signless(32))


def _after(buffer: Any) -> Any:
    is_last = arith.cmpi(arith.CmpIPredicate.eq, buffer, _word(BUFFERS - 1))
    return arith.select(is_last, _word(0), arith.addi(buffer, _word(1)))


def _send(address: Any, words: Words, offset: int) -> None:
    utils.inline_ptx(f"st.volatile.global.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *words, has_side_effects=True)


def _wait_for_words(address: Any, offsets: Sequence[int]) -> list[Words]:
    """Four words at each offset, once none of all of them is 0."""
    count = 4 * len(offsets)
    i32 = ir.IntegerType.get_signless(32)
    fours = [", ".join(f"word{i}" for i in range(first, first + 4)) for first in range(0, count, 4)]
    loads = [f"ld.volatile.global.v4.b32 {{{four}}}, [from+{offset}];" for four, offset in zip(fours, offsets, strict=True)]
    checks = [f"setp.eq.or.b32 missing, word{i}, 0, missing;" for i in range(1, count)]
    moves = [f"mov.b32 ${i}, word{i};" for i in range(count)]
    ptx = f"""{{
        .reg .pred missing;
        .reg .b32 reads, word<{count}>;
        .reg .b64 from;
        mov.b64 from, ${count};
        mov.b32 reads, 0;
        again:
        {" ".join(loads)}
        setp.eq.b32 missing, word0, 0;
        {" ".join(checks)}
        @!missing bra end;
        add.u32 reads, reads, 1;
        setp.lt.u32 missing, reads, {PATIENCE};
        @missing bra again;
        trap;
        end:
        {" ".join(moves)}
    }}"""
    found = utils.inline_ptx(ptx, address, result_types=[i32] * count, has_side_effects=True)
    return [found[first : first + 4] for first in range(0, count, 4)]
