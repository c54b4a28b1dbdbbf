"""How the tensors of recurrent mixers, which checkpoints fuse in many ways, make up our parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.models.families.assembly import Assembly, Index, ReadTensor, Shape, Target, transpose

Part = Callable[[Target], tuple[int, int]]
"""Which rows of a fused tensor a parameter is: the first one, and how many rows the tensor has in all."""


@dataclass(frozen=True)
class Rows(Assembly):
    """Some rows of a torch Linear's weight [out, in] as [in, *axes], or of its bias [out] as [*axes].

    Attributes:
        axes: how many axes of ours the rows are spread over.
        part: which rows; None for all of them.
    """

    name: str
    axes: int = 1
    part: Part | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        return ((self._rows(target)[1], *self._inner(target.shape[: -self.axes])),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        inputs, (first, *others) = index[: -self.axes], index[-self.axes :]
        inner = target.shape[len(target.shape) - self.axes + 1 :]
        start, step = self._rows(target)[0], math.prod(inner)
        rows = slice(start + first.start * step, start + first.stop * step)
        part = self._read(tensors[0], rows, inputs)
        part = part.reshape(*part.shape[:-1], first.stop - first.start, *inner)
        return part[(*[slice(None)] * (len(inputs) + 1), *others)]

    def _rows(self, target: Target) -> tuple[int, int]:
        return (0, math.prod(target.shape[-self.axes :])) if self.part is None else self.part(target)

    def _inner(self, inputs: Shape) -> Shape:
        return inputs

    def _read(self, tensor: ReadTensor, rows: slice, inputs: Index) -> np.ndarray:
        return transpose(tensor((rows, *inputs)))


@dataclass(frozen=True)
class ConvRows(Rows):
    """Some channels of a depthwise torch Conv1d's weight [channels, 1, K] as [K, *axes]."""

    def _inner(self, inputs: Shape) -> Shape:
        return (1, *inputs)

    def _read(self, tensor: ReadTensor, rows: slice, inputs: Index) -> np.ndarray:
        return transpose(tensor((rows, slice(0, 1), *inputs))[:, 0])
