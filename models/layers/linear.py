"""Parameters, and the one matmul that every layer goes through. Knows no layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import MODEL_AXIS, LogicalAxes, Runtime, StepBatch
from jaxserve.models.layers.quantized import Fp8Rows, Fp8Weight, linear_fp8, multiply_fp8

MANY_ROWS = 256  # from which on a CPU's products with the weight on the right are the quicker ones


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputsFirst:
    """A matmul's weight as torch's checkpoints have it, so that a CPU need not turn it over while it loads.

    Attributes:
        values: [*out, *in].
    """

    values: Float[Array, ...]


def parameter(
    shape: Sequence[int],
    axes: LogicalAxes,
    dtype: DTypeLike,
    *,
    mean: float = 0.0,
    std: float = 0.02,
    contract: int | None = None,
    batch: int = 0,
    inputs: int | None = None,
) -> nnx.Param[jax.Array]:
    """A parameter with its logical axes. Zeros until weights are loaded; abstract under nnx.eval_shape.

    Args:
        mean, std: of the values that dummy weights take.
        contract: for what may be quantised, as its layer reads an Fp8Weight: how many axes meet the input.
        batch: axes before those, which stay apart: the experts.
        inputs: for what only `linear` reads, which may then be OutputsFirst: how many leading axes meet the input.
    """
    zeros = jnp.zeros(shape, dtype)
    return nnx.Param(zeros, logical_axes=axes, mean=mean, std=std, contract=contract, batch=batch, inputs=inputs)


def weight(shape: Sequence[int], axes: LogicalAxes, dtype: DTypeLike, *, contract: int = 1) -> nnx.Param[jax.Array]:
    """A matmul's parameter for `linear`, whose first `contract` axes meet the input; quantised when that is asked for."""
    return parameter(shape, axes, dtype, std=math.prod(shape[:contract]) ** -0.5, contract=contract, inputs=contract)


def value(param: nnx.Param[jax.Array] | None) -> jax.Array | None:
    """The array of a parameter that may be missing, such as a bias."""
    return None if param is None else param.get_value()


def linear(
    x: Float[Array, "T ..."] | Fp8Rows,
    w: Float[Array, ...] | Fp8Weight | OutputsFirst,
    bias: Float[Array, ...] | None = None,
    *,
    contract: int = 1,
    transpose: bool = False,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "T ..."]:
    """x times w, plus bias: the last `contract` axes of x meet the first of w, and w's other axes follow T in the result.

    Args:
        x: rounded already only where w is an Fp8Weight without an input_scale.
        transpose: x meets the last axes of w instead: for a tied embedding table [V, D].
        out_dtype: of the result; x's if not given. The products are summed in float32 in any case.
    """
    y = _product(x, w, contract, transpose, out_dtype or x.dtype)
    return y if bias is None else y + bias


def linear_unscaled(
    x: Float[Array, "T ..."] | Fp8Rows, w: Float[Array, ...] | Fp8Weight | OutputsFirst, bias: Float[Array, ...] | None
) -> tuple[Float[Array, "T ..."], tuple[Array | None, Array | None]]:
    """The same for who applies scales himself: x times w, plus bias, and what rows and columns are yet to be multiplied by, if so."""
    if isinstance(w, Fp8Weight) and w.has_kernel and bias is None:
        y, row_scales = multiply_fp8(x, w)
        return y, (row_scales.reshape(-1), w.scales)
    return linear(x, w, bias), (None, None)


def _product(
    x: Array | Fp8Rows, w: Array | Fp8Weight | OutputsFirst, contract: int, transpose: bool, out_dtype: DTypeLike
) -> Array:
    if isinstance(w, Fp8Weight):
        return linear_fp8(x, w, contract, out_dtype)
    assert not isinstance(x, Fp8Rows)
    if isinstance(w, OutputsFirst):
        return _linear_outputs_first(x, w.values, contract, out_dtype)
    x_axes = tuple(range(x.ndim - contract, x.ndim))
    w_axes = tuple(range(w.ndim - contract, w.ndim)) if transpose else tuple(range(contract))
    return jax.lax.dot_general(x, w, ((x_axes, w_axes), ((), ())), precision=_precision(x), preferred_element_type=out_dtype)


def _linear_outputs_first(x: Array, w: Array, contract: int, out_dtype: DTypeLike) -> Array:
    """With the weight on the left: XLA on a CPU packs the right side of a product anew each time, which takes as long as the
    arithmetic of 16 rows, and reads the left side as it lies. But for the barrier it would swap them. Of many rows the result
    is what costs, which then would have to be turned over.
    """
    x = x.reshape(*x.shape[: x.ndim - contract], -1)  # several axes in common would be copied into one in each step
    w = w.reshape(*w.shape[: w.ndim - contract], -1)
    if x.ndim == 2 and x.shape[0] >= MANY_ROWS:
        matrix = w.reshape(-1, w.shape[-1])  # of more axes it would be turned over
        y = jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), precision=_precision(x), preferred_element_type=out_dtype)
        return y.reshape(-1, *w.shape[:-1])
    axes = ((w.ndim - 1,), (x.ndim - 1,))
    y = jax.lax.dot_general(w, x, (axes, ((), ())), precision=_precision(x), preferred_element_type=out_dtype)
    rows = x.ndim - 1
    return jnp.moveaxis(jax.lax.optimization_barrier(y), range(y.ndim - rows, y.ndim), range(rows))


def _precision(x: Array) -> jax.lax.Precision | None:
    """float32 is asked for to get float32: GPUs and TPUs would otherwise round the inputs to fewer bits."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def linear_of_parts(
    x: Float[Array, "T ..."] | Fp8Rows,
    w: Float[Array, ...] | Fp8Weight | OutputsFirst,
    bias: Float[Array, ...] | None = None,
    *,
    batch: StepBatch,
    runtime: Runtime,
    contract: int = 1,
) -> Float[Array, "T ..."]:
    """As linear, where the first axis that x and w have in common is cut over the devices: heads, or an mlp's F.

    Where devices add up by themselves, each rounds its part of a row to 8 bits by that part's largest value.
    """
    if isinstance(w, OutputsFirst) or isinstance(x, Fp8Rows):
        return linear(x, w, bias, contract=contract)
    y = runtime.sum_parts(partial(linear, contract=contract), x, w, cut_of_inputs(w, contract), x.ndim - contract, batch)
    return y if bias is None else y + bias


def cut_of_inputs(w: Array | Fp8Weight, contract: int) -> Any:
    """How the weight, or its arrays, are cut over the devices along the first axis that meets the input."""
    if not isinstance(w, Fp8Weight):
        return P(MODEL_AXIS)
    inputs, whole = P(*(None,) * (w.values.ndim - contract), MODEL_AXIS), None if w.input_scale is None else P()
    return replace(w, values=cast(Any, inputs), scales=cast(Any, P()), input_scale=cast(Any, whole))


def linear_by_head(x: Float[Array, "T N A"], w: Float[Array, "N A B"]) -> Float[Array, "T N B"]:
    """Each head's x times its own matrix."""
    return jnp.einsum("TNA,NAB->TNB", x, w, precision=_precision(x), preferred_element_type=x.dtype)
