"""MXFP4 tensors of a checkpoint (gpt-oss): numbers of 4 bits, a power of two for each 32 of them. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.assembly import Index, Shape
from jaxserve.models.loading.source import StoredTensor

BLOCK = 32  # numbers that share a scale
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the upper 8 codes are their negatives
_CODES = np.array((*_POSITIVE, *(-x for x in _POSITIVE)), np.float32)
_BLOCKS, _SCALES = "_blocks", "_scales"


def _table() -> np.ndarray:
    """What each code stands for under each scale, [scale * 16 + code]: exact in bfloat16."""
    with np.errstate(over="ignore"):
        return np.ldexp(_CODES, np.arange(256)[:, None] - 127).astype(ml_dtypes.bfloat16).reshape(-1).view(np.uint16)


_TABLE = _table()


@dataclass(frozen=True)
class Mxfp4Tensor:
    """[experts, inputs, outputs] in bfloat16, as gpt-oss has them unquantised.

    Attributes:
        blocks: [experts, outputs, inputs / 32, 16] bytes, the number of the lower bits first.
        scales: [experts, outputs, inputs / 32] bytes: 127 more than the power of two.
    """

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> Shape:
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * BLOCK, outputs

    def read(self, index: Index) -> np.ndarray:
        experts, inputs, outputs = index
        groups = slice(inputs.start // BLOCK, -(-inputs.stop // BLOCK))
        packed = self.blocks.read((experts, outputs, groups, slice(0, BLOCK // 2)))
        row = self.scales.read((experts, outputs, groups)).astype(np.uint16)[..., None] << 4
        at = np.empty((*packed.shape, 2), np.uint16)
        np.bitwise_or(row, packed & 15, out=at[..., 0])
        np.bitwise_or(row, packed >> 4, out=at[..., 1])
        numbers: np.ndarray = np.take(_TABLE, at).view(ml_dtypes.bfloat16).reshape(*packed.shape[:2], -1)
        start = inputs.start - groups.start * BLOCK
        return numbers[..., start : start + inputs.stop - inputs.start].swapaxes(1, 2)


def join_blocks(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, with NAME in place of each NAME_blocks and NAME_scales.

    Raises:
        ModelLoadError: blocks without scales that fit.
    """
    joined = dict(tensors)
    for name in [name for name in tensors if name.endswith(_BLOCKS)]:
        base, blocks = name.removesuffix(_BLOCKS), joined.pop(name)
        scales = joined.pop(base + _SCALES, None)
        if scales is None or blocks.shape != (*scales.shape, BLOCK // 2) or len(scales.shape) != 3:
            raise ModelLoadError(
                f"tensor {name} {list(blocks.shape)} and its scales {None if scales is None else list(scales.shape)} do not make "
                f"MXFP4 experts [experts, outputs, inputs / {BLOCK}, {BLOCK // 2}]. Is the checkpoint complete?"
            )
        joined[base] = Mxfp4Tensor(blocks, scales)
    return joined
