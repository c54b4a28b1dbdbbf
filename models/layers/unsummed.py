"""Products whose parts and scales are left to the kernel that reads them, and a residual stream that waits for one. Knows no layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxserve.models.interface import MODEL_AXIS, Runtime, StepBatch, cut_at
from jaxserve.models.layers.linear import OutputsFirst, cut_of_inputs, linear, linear_of_parts
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight, rounded
from jaxserve.pallas_kernels.collectives import add_up, all_reduce, all_reduce_normed
from jaxserve.pallas_kernels.residual_norm import add_and_normalize, reference

MANY_ROWS = 256  # from which on a product has work for all multiprocessors as it is
MULTIPROCESSORS = 132  # of an H100


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """What rows times a weight will be: the sum of the parts, times the scales.

    Attributes:
        parts: [S, T, *out], in float32 where S is not 1.
        row_scales, scales: [T] and [*out]; None for weights that are not of 8 bits.
    """

    parts: Float[Array, "S T ..."]
    row_scales: Float[Array, " T"] | None = None
    scales: Float[Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unadded:
    """A residual stream whose last change is still a product. On several devices each has as many of its parts, and rounds their sum."""

    x: Float[Array, "T D"]
    change: Product


def added(x: Float[Array, "T ..."] | Unadded, batch: StepBatch, runtime: Runtime) -> Float[Array, "T ..."]:
    """The residual stream, with what it waits for."""
    if not isinstance(x, Unadded):
        return x
    if runtime.has_one_device:
        return reference.add(x.x, x.change.parts, x.change.row_scales, x.change.scales)
    dtype = x.x.dtype

    def local(parts: Array, peers: Array) -> Array:
        return all_reduce(add_up(parts, dtype), peers, MODEL_AXIS)

    cut = P(MODEL_AXIS)
    summed: Array = runtime.sharded(local, (cut, cut), P())(x.change.parts, batch.peers)
    return x.x + summed


def added_normed(
    x: Unadded,
    gain: Float[Array, " D"],
    batch: StepBatch,
    runtime: Runtime,
    *,
    eps: float,
    offset: float,
    rounds: bool,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"] | Fp8Rows]:
    """The residual stream with what it waits for, and the RMS norm of that times (gain + offset).

    Args:
        rounds: the norm, to 8 bits; on one device.
    """
    how: Any = {"eps": eps, "offset": offset}
    if runtime.has_one_device:
        arrays = (x.x, x.change.parts, gain, x.change.row_scales, x.change.scales)
        stream, normed, *scales = add_and_normalize(*arrays, **how, rounds=rounds, implementation=runtime.attention)
        return stream, Fp8Rows(normed, scales[0], dtype=stream.dtype) if rounds else normed
    assert not rounds

    def local(parts: Array, residual: Array, gain: Array, peers: Array) -> tuple[Array, Array]:
        return all_reduce_normed(parts, residual, gain, peers, MODEL_AXIS, **how)

    cut, whole = P(MODEL_AXIS), P()
    together = runtime.sharded(local, (cut, whole, whole, cut), (whole, whole))
    result: tuple[Array, Array] = together(x.change.parts, x.x, gain, batch.peers)
    return result


def multiply_in_parts(
    x: Float[Array, "T ..."] | Fp8Rows,
    w: Float[Array, ...] | Fp8Weight | OutputsFirst,
    runtime: Runtime,
    contract: int = 1,
    devices: int = 1,
) -> Product | None:
    """x times w, where kernels add up and scale what products give; None where `linear` does all of it, which is as quick.

    Args:
        devices: over how many the outputs are cut.
    """
    if not runtime.sums_in_kernels or isinstance(w, OutputsFirst) or x.dtype != jnp.bfloat16:
        return None
    if isinstance(w, Fp8Weight):
        if not w.has_kernel:
            return None
        values, row_scales = rounded(x, w, contract)
        out, matrix = w.scales.shape, w.values.reshape(math.prod(w.scales.shape), -1)
        rows, inputs = values.reshape(values.shape[0], -1), 1
        parts = _multiply(rows, matrix, inputs, split_count(rows.shape[0], rows.shape[1], matrix.shape[0]))
        return Product(parts.reshape(*parts.shape[:2], *out), row_scales.reshape(-1), w.scales)
    assert not isinstance(x, Fp8Rows)
    out, rows = w.shape[contract:], x.reshape(x.shape[0], -1)
    count = split_count(rows.shape[0], rows.shape[1], math.prod(out) // devices)
    if count == 1:
        return None
    parts = _multiply(rows, w.reshape(rows.shape[1], -1), 0, count)
    return Product(parts.reshape(*parts.shape[:2], *out))


def add_product(
    x: Float[Array, "T D"],
    hidden: Float[Array, "T ..."] | Fp8Rows,
    w: Array | Fp8Weight | OutputsFirst,
    batch: StepBatch,
    runtime: Runtime,
    contract: int = 1,
) -> Float[Array, "T D"] | Unadded:
    """The residual stream x plus hidden times w, whose first axis in common is cut over the devices if there are several."""
    if runtime.has_one_device:
        product = multiply_in_parts(hidden, w, runtime, contract)
    else:
        product = _multiply_cut(hidden, w, batch, runtime, contract)
    if product is None:
        return x + linear_of_parts(hidden, w, batch=batch, runtime=runtime, contract=contract)
    return Unadded(x, product)


def split_count(rows: int, inputs: int, outputs: int) -> int:
    """In how many parts a product of few rows is cut along its inputs, so that all multiprocessors read weights.

    With tiles of 128 outputs, a tile a multiprocessor is best where parts have 256 inputs, and two where they have 1,536
    (bench/kernels/split_products.py).
    """
    tiles, count = -(-outputs // 128), 1
    if rows >= MANY_ROWS:
        return 1
    while inputs % (32 * count) == 0 and inputs // (2 * count) >= 256:
        most = MULTIPROCESSORS * (2 if inputs // (2 * count) >= 1536 else 1)
        if 2 * count * tiles > most:
            break
        count *= 2
    return count


def _multiply_cut(
    x: Float[Array, "T ..."] | Fp8Rows, w: Array | Fp8Weight | OutputsFirst, batch: StepBatch, runtime: Runtime, contract: int
) -> Product | None:
    """x times w, of which each device has some of what they have in common; None where devices do not add up by themselves."""
    if batch.peers is None or isinstance(x, Fp8Rows) or isinstance(w, OutputsFirst):
        return None
    axis = x.ndim - contract
    if x.shape[axis] % runtime.num_devices:
        return None

    def local(x: Array, w: Array | Fp8Weight) -> Array:
        product = multiply_in_parts(x, w, runtime, contract)
        return linear(x, w, contract=contract)[None] if product is None else product.parts

    cuts = (cut_at(axis, x.ndim), cut_of_inputs(w, contract))
    parts: Array = runtime.sharded(local, cuts, P(MODEL_AXIS))(x, w)
    return Product(parts)


def _multiply(x: Float[Array, "T I"], w: Float[Array, ...], inputs: int, count: int) -> Float[Array, "S T O"]:
    """In `count` parts.

    Args:
        inputs: the axis of w that meets x.
    """
    if count == 1:
        y = jax.lax.dot_general(x, w, (((1,), (inputs,)), ((), ())), preferred_element_type=jnp.bfloat16)
        return y[None]
    x = x.reshape(x.shape[0], count, -1)
    w = w.reshape(*w.shape[:inputs], count, -1, *w.shape[inputs + 1 :])
    axes = ((2,), (inputs + 1,)), ((1,), (inputs,))
    return jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32)
