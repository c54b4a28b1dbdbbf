"""How the experts of a checkpoint, apart or fused in one of many ways, make up one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxserve.models.families.assembly import Assembly, Index, ReadTensor, Shape, Target, stack


def _parts_of(columns: slice, dim: int) -> list[tuple[int, slice]]:
    """Which outputs of which parts stand in a range of columns, where parts of `dim` outputs stand side by side."""
    parts = range(columns.start // dim, -(-columns.stop // dim))
    return [(part, slice(max(columns.start - part * dim, 0), min(columns.stop - part * dim, dim))) for part in parts]


@dataclass(frozen=True)
class ExpertUp(Assembly):
    """Each expert's gate and up [F, D] as [E, D, 2 F], from a tensor each; up alone where experts are not gated.

    Attributes:
        parts: patterns of gate and up.
    """

    parts: tuple[str, ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.parts

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        experts, d_model, columns = target.shape
        return ((columns // len(self.parts), d_model),) * (experts * len(self.parts))

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        experts, inputs, columns = index
        num, parts = target.shape[0], _parts_of(columns, target.shape[2] // len(self.parts))
        every = [(e, *part) for e in range(experts.start, experts.stop) for part in parts]
        stored = np.concatenate([tensors[part * num + e]((outputs, inputs)) for e, part, outputs in every])
        return stored.reshape(experts.stop - experts.start, -1, stored.shape[1]).swapaxes(1, 2)


@dataclass(frozen=True)
class ExpertDown(Assembly):
    """Each expert's down [D, F] as [E, F, D], from a tensor each."""

    name: str

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        experts, dim, d_model = target.shape
        return ((d_model, dim),) * experts

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        experts, inputs, outputs = index
        return stack([tensors[e]((outputs, inputs)).T for e in range(experts.start, experts.stop)], axis=0)


@dataclass(frozen=True)
class FusedUp(Assembly):
    """All experts' gates and ups in one tensor as [E, D, 2 F], or their biases [E, 2 F].

    Attributes:
        layout: [E, 2 F, D] as torch's Linear has it; [E, D, 2 F] with the gates first; [E, D, 2 F] with gate and up in turn.
    """

    name: str
    layout: Literal["linear", "halves", "interleaved"] = "linear"

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        experts, *inputs, columns = target.shape
        return ((experts, columns, *inputs) if self.layout == "linear" else target.shape,)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        experts, *inputs, columns = index
        if self.layout == "linear":
            return np.moveaxis(tensors[0]((experts, columns, *inputs)), 1, -1)
        if self.layout == "halves":
            return tensors[0](index)
        both = tensors[0]((experts, *inputs, slice(0, target.shape[-1])))
        return both.reshape(*both.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(both.shape)[..., columns]


@dataclass(frozen=True)
class FusedDown(Assembly):
    """All experts' downs in one tensor as [E, F, D]: stored so, or as [E, D, F] as torch's Linear has it."""

    name: str
    is_linear: bool = True

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        experts, dim, d_model = target.shape
        return ((experts, d_model, dim) if self.is_linear else (experts, dim, d_model),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        experts, inputs, outputs = index
        if self.is_linear:
            return tensors[0]((experts, outputs, inputs)).swapaxes(1, 2)
        return tensors[0](index)


@dataclass(frozen=True)
class StackedRows(Assembly):
    """Experts one above the other in [E * F, D] tensors (DBRX): gate and up as [E, D, 2 F], or down as [E, F, D]."""

    parts: tuple[str, ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.parts

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        experts, d_model, dim = target.shape[0], target.shape[1], target.shape[2] // len(self.parts)
        return ((experts * (dim if len(self.parts) > 1 else d_model), d_model if len(self.parts) > 1 else dim),) * len(self.parts)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        if len(self.parts) == 1:
            experts, inputs, outputs = index
            rows = tensors[0]((slice(experts.start * target.shape[1], experts.stop * target.shape[1]), outputs))
            return rows.reshape(-1, target.shape[1], rows.shape[-1])[:, inputs]
        experts, inputs, columns = index
        dim = target.shape[2] // len(self.parts)
        rows_of = slice(experts.start * dim, experts.stop * dim)
        read = [(tensors[part]((rows_of, inputs)), outputs) for part, outputs in _parts_of(columns, dim)]
        split = [rows.reshape(-1, dim, rows.shape[-1])[:, outputs].swapaxes(1, 2) for rows, outputs in read]
        return np.concatenate(split, axis=2)
