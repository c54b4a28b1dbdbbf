"""Thresholds on an NVIDIA GPU: one warpgroup a row, which reads it twice and searches what lies above a first bound.

The first reading gives the largest logit and, of each lane (every 2,048th token), its largest and its sum of weights: enough
for a bound that is surely not above the wanted threshold. The second keeps all that is not below it in shared memory, where the search
goes on digit by digit over the bits. If the bound is too low for that, another reading finds a better one; if even so there is too
much to keep (flat logits), the row itself is searched: slow, and exact too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.kept_tokens.api import Cuts, order_of

plgpu: Any = _mosaic_gpu  # not typed
mgpu: Any = _utils

THREADS = 128
EACH = 4  # numbers of a thread that are one array here: Python takes as long for an array of one
LINE = EACH * THREADS
LINES = 8  # under way at once
LANES = 4  # lines of lanes, of which the largest and the sum are kept
DEPTH = 50  # lines in shared memory; two thread blocks share a multiprocessor
MANY = 0.995  # of the lanes: if so many have a logit above the bound, there are too many to keep
BOUND_DIGITS = 10  # of 2 bits: sign, exponent and 11 bits of the first bound
LEAST = int(np.iinfo(np.int32).min)
FLOAT_LEAST = float(np.finfo(np.float32).min)
ORDER_OF_LEAST = int(np.float32(FLOAT_LEAST).view(np.int32)) ^ 0x7FFFFFFF
ROUNDING = 1e-5  # of a row's weights: what sums in other orders may differ by
LAYOUT = plgpu.Layout.WG_STRIDED((LINE,), vec_size=1)
Fold = Callable[[Any, list[jax.Array]], Any]


def serves(vocab_size: int) -> bool:
    """Whether the kernel takes rows of so many logits: counts are float32."""
    return LINE <= vocab_size < 2**24


def least_kept(logits: Float[Array, "S V"], cuts: Cuts) -> Int[Array, " S"]:
    """See api.least_kept."""
    rows, vocab_size = logits.shape
    top_k = jnp.where((cuts.top_k > 0) & (cuts.top_k < vocab_size), cuts.top_k, 0).astype(jnp.float32)
    fields = jnp.stack([cuts.scale, top_k, cuts.top_p, cuts.log_min_p], axis=1)
    found: Array = plgpu.kernel(
        _search_row,
        out_type=jax.ShapeDtypeStruct((rows, LINE), jnp.int32),
        grid=(rows,),
        grid_names=("row",),
        scratch_types=[plgpu.SMEM((DEPTH, LINE), jnp.float32)],
        # The other one looks for a layout of each of thousands of arrays, which takes minutes; here there is but one.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(logits, fields)
    return found[:, 0]


def append(x: jax.Array, bound: jax.Array, count: jax.Array, kept: Any) -> jax.Array:
    """Puts each thread's numbers of x that are not below `bound` behind its others in `kept`, unless it is full.

    Returns:
        How many each thread has had (`count` before), at all its places.
    """

    def put(ctx: Any, x: Any, bound: Any, count: Any, kept: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)

        def number(register: Any) -> Any:
            return vector.extract(register, dynamic_position=[], static_position=[0])

        thread, n = arith.remui(mgpu.thread_idx(), mgpu.c(THREADS, i32)), number(count.registers.flat[0])
        for register in x.registers.flat:
            place = arith.addi(arith.muli(n, mgpu.c(THREADS, i32)), thread)
            n = mgpu.inline_ptx(
                f"{{ .reg .pred p, q; setp.ge.f32 p, $2, $3; setp.lt.and.s32 q, $4, {EACH * DEPTH}, p; "
                "@q st.shared.f32 [$1], $2; mov.s32 $0, $4; @p add.s32 $0, $0, 1; }",
                llvm.ptrtoint(i32, mgpu.getelementptr(mgpu.memref_ptr(kept), [place], ir.F32Type.get())),
                number(register), bound.registers.item(), n, result_types=i32, has_side_effects=True,
            )  # fmt: skip
        registers = np.full_like(count.registers, vector.broadcast(count.registers.flat[0].type, n))
        return FragmentedArray(_registers=registers, _layout=count.layout, _is_signed=True)

    result = plgpu.ShapeDtypeStruct((LINE,), jnp.int32, layout=LAYOUT)
    counts: jax.Array = plgpu.inline_mgpu(
        arg_types=(LAYOUT, plgpu.Layout.WG_SPLAT(()), LAYOUT, plgpu.RefType()), return_type=result
    )(put)(x, bound, count, kept)
    return counts


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of logits as the kernel reads it."""

    logits: Any
    row: jax.Array
    scale: jax.Array

    def fold(self, f: Fold, init: Any) -> Any:
        """f(... f(init, lines) ..., lines) over all of the row's scaled logits, some lines at a time.

        Lines come in the same order each time. A line has -inf where the row has ended.
        """
        size = self.logits.shape[1]
        blocks, rest = divmod(size, LINES * LINE)

        def load(start: Any) -> jax.Array:
            line: jax.Array = plgpu.load(self.logits.at[self.row, pl.ds(start, LINE)], layout=LAYOUT)
            return line

        def block(i: Any) -> list[jax.Array]:
            return [load(i * (LINES * LINE) + u * LINE) for u in range(LINES)]

        def step(i: jax.Array, state: Any) -> Any:
            acc, lines = state
            following = block(jnp.minimum(i + 1, blocks - 1))  # under way while these are worked on
            return f(acc, [x * self.scale for x in lines]), following

        acc = init
        if blocks:
            acc, _ = lax.fori_loop(0, blocks, step, (acc, block(0)))
        if rest:
            starts = [(start, min(start, size - LINE)) for start in range(blocks * LINES * LINE, size, LINE)]
            place = plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=LAYOUT)
            lines = [jnp.where(place >= start - at, load(at) * self.scale, -jnp.inf) for start, at in starts]
            acc = f(acc, lines)
        return acc


def _float_of(order: jax.Array) -> jax.Array:
    """The float of this order; -inf for what is below all floats."""
    x = lax.bitcast_convert_type(order ^ ((order >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)
    return jnp.where(order < ORDER_OF_LEAST, -jnp.inf, x)


def _largest(parts: Callable[[list[jax.Array]], list[jax.Array]], wanted: jax.Array, digits: Any, bits: int) -> jax.Array:
    """The largest order whose sum of `parts` reaches `wanted`, of so many digits; LEAST if there is none.

    Args:
        parts: gives for some orders what each thread's numbers of at least this order add up to.
    """

    def step(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, unit = state
        candidates = [(found + unit * d) ^ LEAST for d in range(1, 2**bits)]
        reached = [(jnp.sum(part) >= wanted).astype(jnp.int32) for part in parts(candidates)]
        return found + unit * functools.reduce(jnp.add, reached), jnp.maximum(unit >> bits, 1)

    found, _ = lax.fori_loop(0, digits, step, (jnp.int32(0), jnp.int32(1 << (32 - bits))))
    order: jax.Array = found ^ LEAST
    return order


def _search_row(logits: Any, fields: Any, out: Any, kept: Any) -> None:
    """The kernel's body."""
    index = lax.axis_index("row")
    scale, top_k, top_p, log_min_p = (fields[index, i] for i in range(4))
    row = _Row(logits, index, scale)
    has_k, has_p = top_k > 0, top_p < 1
    is_searched = has_k | has_p

    def write(order: jax.Array) -> None:
        out.at[index][...] = line(order)

    @pl.when(~is_searched & ~(log_min_p > -jnp.inf))
    def _() -> None:
        write(jnp.int32(LEAST))

    @pl.when(is_searched | (log_min_p > -jnp.inf))
    def _() -> None:
        tops, sums = _read(row)
        top = jnp.max(functools.reduce(jnp.maximum, tops))
        floor = order_of(top + log_min_p)

        @pl.when(~is_searched)
        def _() -> None:
            write(floor)

        @pl.when(is_searched)
        def _() -> None:
            bound = _find_bound(row, tops, sums, top, top_k, top_p)
            most, count, total = _keep(row, kept, top, bound)

            def fold_kept(f: Fold, init: Any) -> Any:
                def step(j: jax.Array, acc: Any) -> Any:
                    x = plgpu.load(kept.at[j], layout=LAYOUT)
                    return f(acc, [jnp.where(place + j * EACH < count, x, -jnp.inf)])

                place = lax.div(plgpu.broadcasted_iota(jnp.int32, (LINE,), 0, layout=LAYOUT), THREADS)
                return lax.fori_loop(0, most, step, init)

            @pl.when(most <= DEPTH)
            def _() -> None:
                write(jnp.maximum(floor, _threshold(fold_kept, top, total, top_k, top_p, bits=2)))

            @pl.when(most > DEPTH)
            def _() -> None:
                write(jnp.maximum(floor, _threshold(row.fold, top, total, top_k, top_p, bits=3)))


def _read(row: _Row) -> tuple[list[jax.Array], list[jax.Array]]:
    """The largest logit of each lane, and the sum of its weights relative to that."""

    def add(state: Any, lines: list[jax.Array]) -> Any:
        tops, sums = list(state[0]), list(state[1])
        for lane in range(LANES):
            mine = lines[lane::LANES]
            if mine:
                top = functools.reduce(jnp.maximum, mine, tops[lane])
                sums[lane] = sums[lane] * jnp.exp(tops[lane] - top)
                for x in mine:
                    sums[lane] += jnp.exp(x - top)
                tops[lane] = top
        return tops, sums

    tops, sums = row.fold(add, ([line(jnp.float32(FLOAT_LEAST))] * LANES, [line(jnp.float32(0))] * LANES))
    return tops, sums


def _find_bound(
    row: _Row, tops: list[jax.Array], sums: list[jax.Array], top: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """A logit that is surely not above the threshold of top-k, or of top-p where there is no top-k.

    For a logit t not above a lane's largest one, the lane's weight of at least t is that one's, and all but what its other
    tokens could weigh below t: n exp(t).
    """
    per_lane = -(-row.logits.shape[1] // (LANES * LINE)) + 1
    has_k = top_k > 0
    largest = [jnp.exp(x - top) for x in tops]
    sums = [s * w for s, w in zip(sums, largest, strict=True)]
    wanted = jnp.where(has_k, top_k, jnp.sum(functools.reduce(jnp.add, sums)) * (top_p + ROUNDING))
    # Counts are searched as weights of 1.
    largest, sums = ([jnp.where(has_k, 1.0, x) for x in xs] for xs in (largest, sums))
    orders = [order_of(x) for x in tops]

    def surely(candidates: list[jax.Array]) -> list[jax.Array]:
        found = []
        for candidate in candidates:
            below = jnp.where(has_k, 0.0, per_lane * jnp.exp(_float_of(candidate) - top))
            parts = [
                jnp.where(order >= candidate, jnp.maximum(s - below, w), 0.0)
                for order, s, w in zip(orders, sums, largest, strict=True)
            ]
            found.append(functools.reduce(jnp.add, parts))
        return found

    bound = jnp.maximum(_float_of(_largest(surely, wanted, BOUND_DIGITS, 2)), FLOAT_LEAST)  # -inf is never drawn
    above = jnp.sum(functools.reduce(jnp.add, [jnp.where(x > bound, 1.0, 0.0) for x in tops]))
    better = functools.partial(_better_bound, row, top, bound, wanted, has_k)
    found: jax.Array = lax.cond(above > MANY * LANES * LINE, better, lambda: bound)
    return found


def _better_bound(row: _Row, top: jax.Array, bound: jax.Array, wanted: jax.Array, has_k: jax.Array) -> jax.Array:
    """The largest of 7 logits between the bound and the top that is surely not above the threshold."""
    base = jnp.maximum(bound, top - 40)
    candidates = [base + (top - base) * (d / 8) for d in range(1, 8)]

    def weigh(x: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.where(has_k, 1.0, jnp.exp(x - top))

    for sums, candidate in zip(_sums(row.fold, weigh, [order_of(c) for c in candidates]), candidates, strict=True):
        bound = jnp.where(jnp.sum(sums) >= wanted, jnp.maximum(bound, candidate), bound)
    return bound


def _keep(row: _Row, kept: Any, top: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts what is not below the bound into `kept`.

    Returns:
        Lines of `kept` in use (more than DEPTH: not all were kept), how many numbers each thread has, all weights' sum.
    """

    def add(state: Any, lines: list[jax.Array]) -> Any:
        count, total = state
        for x in lines:
            count = append(x, bound, count, kept)
            total += jnp.exp(x - top)
        return count, total

    count, total = row.fold(add, (line(jnp.int32(0)), line(jnp.float32(0))))
    most = lax.div(jnp.max((count + (EACH - 1)).astype(jnp.float32)).astype(jnp.int32), EACH)
    return most, count, jnp.sum(total)


def _sums(
    fold: Callable[[Fold, Any], Any], weigh: Callable[[jax.Array, jax.Array], Any], candidates: list[jax.Array]
) -> list[jax.Array]:
    """For each candidate, what the numbers of at least this order add up to, at each place of a line; weigh(number, order)."""

    def add(acc: list[jax.Array], lines: list[jax.Array]) -> list[jax.Array]:
        for x in lines:
            order = order_of(x)
            weight = weigh(x, order)
            acc = [a + jnp.where(order >= c, weight, 0.0) for a, c in zip(acc, candidates, strict=True)]
        return acc

    found: list[jax.Array] = fold(add, [line(jnp.float32(0))] * len(candidates))
    return found


def _threshold(
    fold: Callable[[Fold, Any], Any], top: jax.Array, total: jax.Array, top_k: jax.Array, top_p: jax.Array, *, bits: int
) -> jax.Array:
    """The order of the least number that top-k, then top-p among those, keep.

    Args:
        fold: over numbers that hold all that are kept.
        total: the whole row's sum of weights.
    """
    digits = -(-32 // bits)
    kth = _largest(functools.partial(_sums, fold, lambda x, order: 1.0), top_k, jnp.where(top_k > 0, digits, 0), bits)

    def weigh(x: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.where(order >= kth, jnp.exp(x - top), 0.0)

    total = jnp.where(top_k > 0, jnp.sum(_sums(fold, weigh, [kth])[0]), total)
    nucleus = _largest(functools.partial(_sums, fold, weigh), top_p * total, jnp.where(top_p < 1, digits, 0), bits)
    return jnp.maximum(kth, nucleus)


def line(x: Any) -> jax.Array:
    """The number for every thread. Registers' bits can be read as another type only in this form."""
    numbers: jax.Array = plgpu.layout_cast(jnp.broadcast_to(x, (LINE,)), LAYOUT)
    return numbers
