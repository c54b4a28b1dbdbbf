"""How thread blocks of kernels on several GPUs meet: where the others' lent memory lies, flags, and 16-byte loads and stores.

Lent memory begins with FLAG_BYTES for each block: a word for each device, which that device raises, and the block's own count. Every
kernel has BLOCKS blocks and counts in all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental.mosaic import gpu as _mgpu
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

mgpu: Any = _mgpu  # not typed
utils: Any = _utils
plgpu: Any = _mosaic_gpu

BLOCKS = 64
THREADS = 128  # of a block
FLAG_BYTES = 128
MOST_DEVICES = FLAG_BYTES // 4 - 1
PATIENCE = 1 << 24  # reads of a flag, some ten seconds; then the kernel traps instead of waiting for ever


@dataclass(frozen=True)
class Place:
    """A thread block's view of its device and the others; all values are of 64 bits, but for the count.

    Attributes:
        own: address of this device's lent memory; lent: of the others', in the order of peers.
        count: of the exchanges that this block has had.
    """

    block: Any
    thread: Any
    rank: Any
    peers: Sequence[Any]
    own: Any
    lent: Sequence[Any]
    count: Any

    @property
    def is_first(self) -> Any:
        """Whether this is the block's first thread."""
        return equal(self.thread, const(0))

    def meet(self, count: Any) -> None:
        """Until the same block of all others is here: what they stored before is then to be seen."""
        flags = times(self.block, FLAG_BYTES)
        mgpu.warpgroup_barrier()
        for base in self.lent:
            flag = plus(base, flags, times(self.rank, 4))
            utils.inline_ptx("st.release.sys.global.b32 [$0], $1;", flag, count, predicate=self.is_first, has_side_effects=True)
        with mgpu.when(self.is_first):
            for peer in self.peers:
                _wait_for(plus(self.own, flags, times(peer, 4)), count)
        mgpu.warpgroup_barrier()

    def leave(self, exchanges: int) -> None:
        """Keeps the count for the next kernel."""
        ptx, address = "st.volatile.global.b32 [$0], $1;", _count_address(self.own, self.block)
        utils.inline_ptx(ptx, address, self.counted(exchanges), predicate=self.is_first, has_side_effects=True)

    def counted(self, exchanges: int) -> Any:
        return arith.addi(self.count, mgpu.c(exchanges, _i32()))


def enter(table_ref: Any, devices: int) -> Place:
    """Reads a device's table: its rank, then the address of each one's lent memory."""
    table = address_of(table_ref)

    def entry(index: Any) -> Any:
        address = plus(table, times(index, 8))
        return utils.inline_ptx("ld.global.b64 $0, [$1];", address, result_types=_i64(), has_side_effects=True)

    rank, block, thread = entry(const(0)), _wide(utils.block_idx()), _wide(mgpu.thread_idx())
    own = entry(plus(rank, const(1)))
    peers = [arith.remui(plus(rank, const(j)), const(devices)) for j in range(1, devices)]
    lent = [entry(plus(peer, const(1))) for peer in peers]
    ptx, address = "ld.volatile.global.b32 $0, [$1];", _count_address(own, block)
    count = utils.inline_ptx(ptx, address, result_types=_i32(), has_side_effects=True)
    return Place(block, thread, rank, peers, own, lent, count)


def load_16(address: Any, offset: int = 0) -> Any:
    """Four words."""
    ptx = f"ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    return utils.inline_ptx(ptx, address, result_types=[_i32()] * 4, has_side_effects=True)


def store_16(address: Any, words: Sequence[Any], offset: int = 0) -> None:
    utils.inline_ptx(f"st.global.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *words, has_side_effects=True)


def const(value: int) -> Any:
    return mgpu.c(value, _i64())


def plus(*values: Any) -> Any:
    first, *others = values
    for other in others:
        first = arith.addi(first, other)
    return first


def times(value: Any, factor: int) -> Any:
    return arith.muli(value, const(factor))


def equal(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def less(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def address_of(ref: Any) -> Any:
    return llvm.ptrtoint(_i64(), utils.memref_ptr(ref))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _i64() -> Any:
    return ir.IntegerType.get_signless(64)


def _wide(value: Any) -> Any:
    narrow = value if value.type == _i32() else arith.index_castui(_i32(), value)
    return arith.extui(_i64(), narrow)


def _count_address(own: Any, block: Any) -> Any:
    return plus(own, times(block, FLAG_BYTES), const(FLAG_BYTES - 4))


def _wait_for(flag: Any, count: Any) -> None:
    """Until the flag, which only grows, is at least the count; both may wrap."""
    ptx = f"""{{
        .reg .pred done;
        .reg .b32 found, reads;
        mov.b32 reads, 0;
        again:
        ld.acquire.sys.global.b32 found, [$0];
        sub.s32 found, found, $1;
        setp.ge.s32 done, found, 0;
        @done bra end;
        add.u32 reads, reads, 1;
        setp.lt.u32 done, reads, {PATIENCE};
        @done bra again;
        trap;
        end:
    }}"""
    utils.inline_ptx(ptx, flag, count, has_side_effects=True)
