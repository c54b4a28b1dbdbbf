"""Products whose parts and scales are left to the kernel that reads them, and a residual stream that waits for one. Knows no layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime
from jaxserve.models.layers.linear import OutputsFirst, linear
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight, rounded
from jaxserve.pallas_kernels.residual_norm import reference

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
    """A residual stream whose last change is still a product."""

    x: Float[Array, "T D"]
    change: Product


def added(x: Float[Array, "T ..."] | Unadded) -> Float[Array, "T ..."]:
    """The residual stream, with what it waits for."""
    if not isinstance(x, Unadded):
        return x
    return reference.add(x.x, x.change.parts, x.change.row_scales, x.change.scales)


def multiply_in_parts(
    x: Float[Array, "T ..."] | Fp8Rows, w: Float[Array, ...] | Fp8Weight | OutputsFirst, runtime: Runtime, contract: int = 1
) -> Product | None:
    """x times w, where kernels add up and scale what products give; None where `linear` does all of it, which is as quick."""
    if not runtime.sums_in_kernels or isinstance(w, OutputsFirst) or x.dtype != jnp.bfloat16:
        return None
    if isinstance(w, Fp8Weight):
        if not w.has_kernel:
            return None
        values, row_scales = rounded(x, w, contract)
        out, matrix = w.scales.shape, w.values.reshape(math.prod(w.scales.shape), -1)
        parts = _multiply(values.reshape(values.shape[0], -1), matrix, 1)
        return Product(parts.reshape(*parts.shape[:2], *out), row_scales.reshape(-1), w.scales)
    assert not isinstance(x, Fp8Rows)
    out, rows = w.shape[contract:], x.reshape(x.shape[0], -1)
    if split_count(rows.shape[0], rows.shape[1], math.prod(out)) == 1:
        return None
    parts = _multiply(rows, w.reshape(rows.shape[1], -1), 0)
    return Product(parts.reshape(*parts.shape[:2], *out))


def add_product(
    x: Float[Array, "T D"], hidden: Float[Array, "T ..."] | Fp8Rows, w: Array | Fp8Weight, runtime: Runtime, contract: int = 1
) -> Float[Array, "T D"] | Unadded:
    """The residual stream x plus hidden times w."""
    product = multiply_in_parts(hidden, w, runtime, contract)
    return x + linear(hidden, w, contract=contract) if product is None else Unadded(x, product)


def split_count(rows: int, inputs: int, outputs: int) -> int:
    """In how many parts a product of few rows is cut along its inputs, so that all multiprocessors read weights.

    Found by what XLA does itself with tiles of 128 outputs: two tiles a multiprocessor where parts have 512 inputs, one where they
    have 256.
    """
    tiles, count = -(-outputs // 128), 1
    if rows >= MANY_ROWS:
        return 1
    while inputs % (32 * count) == 0 and inputs // (2 * count) >= 256:
        most = MULTIPROCESSORS * (2 if inputs // (2 * count) >= 512 else 1)
        if 2 * count * tiles > most:
            break
        count *= 2
    return count


def _multiply(x: Float[Array, "T I"], w: Float[Array, ...], inputs: int) -> Float[Array, "S T O"]:
    """In parts, if that is quicker.

    Args:
        inputs: the axis of w that meets x.
    """
    rows, outputs = x.shape[0], w.shape[1 - inputs]
    count = split_count(rows, x.shape[1], outputs)
    if count == 1:
        y = jax.lax.dot_general(x, w, (((1,), (inputs,)), ((), ())), preferred_element_type=jnp.bfloat16)
        return y[None]
    x = x.reshape(rows, count, -1)
    w = w.reshape(*w.shape[:inputs], count, -1, *w.shape[inputs + 1 :])
    axes = ((2,), (inputs + 1,)), ((1,), (inputs,))
    return jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32)
