"""e4m3 weights of a checkpoint, kept with their scales where a matmul can take them so; all others are dequantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import numpy as np
from jax.sharding import Sharding

from jaxserve.models.description import Form, Parameter
from jaxserve.models.families.assembly import Assembly, Index, Target
from jaxserve.models.interface import ShardingFor
from jaxserve.models.layers.quantized import FP8, put_inputs_last
from jaxserve.models.loading.checkpoint_quantization import CheckpointQuantization
from jaxserve.models.loading.fp8_tensors import ScaledTensor
from jaxserve.models.loading.placing import place_parts
from jaxserve.models.loading.source import StoredTensor


def choose_form(parameter: Parameter, quantization: CheckpointQuantization, is_kept: bool) -> Form:
    """How to hold a parameter of a quantised checkpoint.

    Args:
        is_kept: the checkpoint has it in 8 bits, with scales that stand for whole channels.
    """
    if not is_kept or parameter.contract is None:
        return parameter.form
    if parameter.batch:  # experts, whose activations are not rounded
        return "fp8"
    forms: dict[str, Form] = {"token": "fp8", "static": "fp8_static", "plain": parameter.form}
    return forms[quantization.activations]


def can_keep(tensors: Sequence[StoredTensor]) -> bool:
    """Whether a parameter's tensors can be held as they are: all of 8 bits, without blocks."""
    return bool(tensors) and all(isinstance(tensor, ScaledTensor) and tensor.block is None for tensor in tensors)


def load_kept(
    tensors: Sequence[StoredTensor], parameter: Parameter, target: Target, assembly: Assembly, sharding_for: ShardingFor
) -> tuple[jax.Array, ...]:
    """The arrays of an Fp8Weight, from tensors that can_keep says yes to; each device reads only its part."""
    scaled = [tensor for tensor in tensors if isinstance(tensor, ScaledTensor)]
    assert parameter.contract is not None and len(scaled) == len(tensors), parameter.path
    shape, contract, batch = parameter.abstract.shape, parameter.contract, parameter.batch
    shardings = [sharding_for(axes, abstract.shape) for abstract, axes in parameter.arrays]
    read_values = partial(assembly.read, [tensor.values.read for tensor in scaled], target)
    values = place_parts(shape, np.dtype(FP8), sharding_for(parameter.axes, shape), read_values)
    turned = turner(contract, batch, shardings[0])(values)
    values.delete()

    def read_scales(index: Index) -> np.ndarray:
        """Of the first value that each output is made of: the others' are the same."""
        one = (*index[:batch], *[slice(0, 1)] * contract, *index[batch:])
        return assembly.read([t.read_scales for t in scaled], target, one).reshape([part.stop - part.start for part in index])

    scales = place_parts(shape[:batch] + shape[batch + contract :], np.dtype(np.float32), shardings[1], read_scales)
    if parameter.form != "fp8_static":
        return turned, scales
    # Tensors that share an input have the same scale; should they not, none may overflow.
    inputs = np.float32(max(t.input_scale for t in scaled if t.input_scale is not None))
    return turned, scales, jax.device_put(inputs, shardings[2])


@cache
def turner(contract: int, batch: int, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """The program that puts the input axes of parameters last, on the devices where they are."""
    return jax.jit(partial(put_inputs_last, contract=contract, batch=batch), out_shardings=sharding)
