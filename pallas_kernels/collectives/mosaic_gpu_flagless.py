"""An exchange of few rows without flags: what is sent is never 0, so a word that is not 0 has come. Neither fence nor flag is waited for.

A block's part of lent memory has three buffers of a slot for each rank. Exchange k uses buffer k % 3 and zeroes the one before, k - 1,
into which the others write again in exchange k + 2: that they begin after they have seen data of this device's k + 1, and so
after its kernel of exchange k has ended.
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
MOST_UNITS = 8  # of 16 bytes a thread, that a block sends
MOST_WORDS = 64  # that a thread waits for at once: they are in registers
SLOT_BYTES = BLOCKS * MOST_UNITS * UNIT_BYTES
Words = Sequence[Any]


def flagless_end(devices: int) -> int:
    """Where this kernel's part of the lent memory ends."""
    return slots_end(devices) + BUFFERS * devices * SLOT_BYTES


def can_exchange(units: int, devices: int) -> bool:
    return units <= MOST_UNITS and 4 * devices * units <= MOST_WORDS


class Flagless:
    """A thread block's exchange."""

    def __init__(self, place: Place, devices: int) -> None:
        self.place, self.devices = place, devices
        self.buffer = place.load_turn()

    def swap(self, mine: Sequence[Words]) -> list[list[Words]]:
        """Sends this device's units to all, itself among them; all ranks' units, in which a pair of zeros has become -0 and 0."""
        i32, place = ir.IntegerType.get_signless(32), self.place
        zero, minus_zero = mgpu.c(0, i32), mgpu.c(-(1 << 31), i32)

        def shown(word: Any) -> Any:
            return arith.select(arith.cmpi(arith.CmpIPredicate.eq, word, zero), minus_zero, word)

        sent = [[shown(word) for word in words] for words in mine]
        for base in (*place.lent, place.own):
            to = plus(self._at(base, self.buffer), times(place.rank, SLOT_BYTES))
            for unit, words in enumerate(sent):
                _send(to, words, unit * UNIT_BYTES)
        offsets = [rank * SLOT_BYTES + unit * UNIT_BYTES for rank in range(self.devices) for unit in range(len(mine))]
        words = _wait_for_words(self._at(place.own, self.buffer), offsets)
        by_rank = len(words) // self.devices
        return [words[first : first + by_rank] for first in range(0, len(words), by_rank)]

    def end(self) -> None:
        """By all threads of every block, whether it had something to send or not."""
        i32, place = ir.IntegerType.get_signless(32), self.place
        zero, one, two = (mgpu.c(number, i32) for number in range(BUFFERS))

        def after(buffer: Any) -> Any:
            return arith.select(arith.cmpi(arith.CmpIPredicate.eq, buffer, two), zero, arith.addi(buffer, one))

        following = after(self.buffer)
        before = self._at(place.own, after(following))
        for rank in range(self.devices):
            for unit in range(MOST_UNITS):
                store_16(before, [zero] * 4, rank * SLOT_BYTES + unit * UNIT_BYTES)
        mgpu.warpgroup_barrier()  # all have read whose turn it is
        place.keep_turn(following)

    def _at(self, base: Any, buffer: Any) -> Any:
        place, wide = self.place, arith.extui(const(0).type, buffer)
        own = plus(times(place.block, MOST_UNITS * UNIT_BYTES), times(place.thread, 16))
        return plus(base, const(slots_end(self.devices)), times(wide, self.devices * SLOT_BYTES), own)


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
