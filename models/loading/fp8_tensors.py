"""e4m3 tensors of a checkpoint and the scales beside them. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.assembly import Index, Shape
from jaxserve.models.loading.checkpoint_quantization import CheckpointQuantization
from jaxserve.models.loading.safe_tensor import FP8, SafeTensor
from jaxserve.models.loading.source import StoredTensor

_WEIGHT_SCALES = ("_scale", "_scale_inv")  # behind the weight's name; the weight is values * scale in either case
_INPUT_SCALES = ("input_scale", "activation_scale")  # in place of "weight"
_KV_SCALE = re.compile(r"\.(q|k|v|prob)_scale$|\.[kvq]_proj\.(output|k|v|q)_scale$")


@dataclass(frozen=True)
class ScaledTensor:
    """e4m3 values that a scale belongs to; read as the float32 numbers that both stand for.

    Attributes:
        scale: of all values, [] or [1]; of each row, [rows, 1]; or of each block, [blocks of rows, blocks of columns].
        block: rows and columns of a block; None for one scale a row, or for all.
        input_scale: what activations are divided by before they are rounded, where the checkpoint says so.
    """

    values: SafeTensor
    scale: np.ndarray
    block: tuple[int, int] | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> Shape:
        return self.values.shape

    def read(self, index: Index) -> np.ndarray:
        numbers = self.values.read(index).astype(np.float32)
        if self.block is None:
            numbers *= self.read_scales(index)
            return numbers
        *outer, rows, columns = index
        height, width = self.block
        for block in range(rows.start // height, -(-rows.stop // height)):
            scales = np.repeat(self.scale[tuple(outer)][..., block, :], width, axis=-1)[..., columns]
            at = slice(max(block * height, rows.start) - rows.start, min((block + 1) * height, rows.stop) - rows.start)
            numbers[..., at, :] *= scales[..., None, :]
        return numbers

    def read_scales(self, index: Index) -> np.ndarray:
        """The scale of each value, where there are no blocks; takes the memory of one for each row."""
        part: np.ndarray = np.broadcast_to(self.scale, self.shape)[index]
        return part


def is_kv_scale(name: str) -> bool:
    """Whether a tensor belongs to 8-bit keys and values."""
    return _KV_SCALE.search(name) is not None


def join_scales(tensors: Mapping[str, StoredTensor], quantization: CheckpointQuantization) -> dict[str, StoredTensor]:
    """The tensors of a quantised checkpoint, those of 8 bits with their scales, which are no tensors of their own then.

    Raises:
        ModelLoadError: a scale is missing or of a wrong shape.
    """
    is_static = quantization.activations == "static"
    rest = {name: tensor for name, tensor in tensors.items() if not is_kv_scale(name)}
    joined: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, SafeTensor) and tensor.dtype == FP8:
            scale = _take(rest, [name + ending for ending in _WEIGHT_SCALES])
            inputs = _take(rest, [name.removesuffix("weight") + ending for ending in _INPUT_SCALES])
            if scale is None or (is_static and inputs is None):
                raise ModelLoadError(f"tensor {name} is of 8 bits, but the checkpoint lacks its scale. Is it complete?")
            scaled = _joined(name, tensor, scale, quantization.block)
            joined[name] = scaled if inputs is None else replace(scaled, input_scale=float(inputs.max()))
    return {name: joined.get(name, tensor) for name, tensor in rest.items()}


def _take(tensors: dict[str, StoredTensor], names: list[str]) -> np.ndarray | None:
    """The first of these that there is, whole and in float32; it is used up by that."""
    found = [tensors.pop(name) for name in names if name in tensors]
    return found[0].read(tuple(slice(0, n) for n in found[0].shape)).astype(np.float32) if found else None


def _joined(name: str, tensor: SafeTensor, scale: np.ndarray, block: tuple[int, int] | None) -> ScaledTensor:
    *outer, rows, columns = tensor.shape
    if scale.size == 1:
        return ScaledTensor(tensor, scale.reshape(()))
    if scale.shape in ((*outer, rows, 1), (*outer, rows)):
        return ScaledTensor(tensor, scale.reshape(*outer, rows, 1))
    if block is not None and scale.shape == (*outer, -(-rows // block[0]), -(-columns // block[1])):
        return ScaledTensor(tensor, scale, block)
    raise ModelLoadError(
        f"the scale of tensor {name} {list(tensor.shape)} has shape {list(scale.shape)}; jaxserve can do one for all, "
        f"one for each row{f', or one for each block of {block[0]} x {block[1]}' if block else ''}"
    )
