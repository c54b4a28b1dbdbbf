"""How the tensors of recurrent mixers, which checkpoints fuse in many ways, make up our parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxserve.models.families.assembly import Assembly, Index, OneOf, ReadTensor, Shape, Target, stack
from jaxserve.models.families.qkv_assembly import Qkv

Part = Callable[[Target], tuple[int, int]]
"""Which rows of a fused tensor a parameter is: the first one, and how many rows the tensor has in all."""


def mixer_of[M](target: Target, kind: type[M]) -> M:
    """The mixer of that kind which the parameter belongs to."""
    assert target.layer is not None, target.path
    return next(mixer for mixer in target.layer.mixers if isinstance(mixer, kind))


def either(*tables: Mapping[str, Assembly]) -> dict[str, Assembly]:
    """One table for layers of several kinds: where paths are the same, the tensors that are there decide."""
    paths = dict.fromkeys(path for table in tables for path in table)
    forms = {path: tuple(table[path] for table in tables if path in table) for path in paths}
    return {path: found[0] if len(found) == 1 else OneOf(found) for path, found in forms.items()}


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
        return tensor((rows, *inputs)).T


@dataclass(frozen=True)
class ConvRows(Rows):
    """Some channels of a depthwise torch Conv1d's weight [channels, 1, K] as [K, *axes]."""

    def _inner(self, inputs: Shape) -> Shape:
        return (1, *inputs)

    def _read(self, tensor: ReadTensor, rows: slice, inputs: Index) -> np.ndarray:
        return tensor((rows, slice(0, 1), *inputs))[:, 0].T


@dataclass(frozen=True)
class CutConv(Assembly):
    """Some channels of one convolution that checkpoints hold in three: cut between q, k and v, or, as transformers saves it, even.

    Attributes:
        tensors: the three.
        whole: reads the one that they make up, whose name does not matter.
        sizes: channels of q, k and v.
    """

    tensors: tuple[str, ...]
    whole: ConvRows
    sizes: Callable[[Target], tuple[int, ...]]
    is_even: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.tensors

    def choose(self, target: Target, shape_of: Callable[[str], Shape | None]) -> Assembly:
        shapes = tuple(map(shape_of, self.tensors))
        even = replace(self, is_even=True)
        return even if shapes == even.shapes(target) else self

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        ((_, *rest),) = self.whole.shapes(target)
        return tuple((size, *rest) for size in self._cut(target))

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        ends = np.cumsum(self._cut(target)).tolist()

        def joined(wanted: Index) -> np.ndarray:
            rows, *rest = wanted
            parts = []
            for read, start, end in zip(tensors, (0, *ends), ends, strict=False):
                first, last = max(rows.start, start), min(rows.stop, end)
                if first < last:
                    parts.append(read((slice(first - start, last - start), *rest)))
            return np.concatenate(parts)

        return self.whole.read([joined], target, index)

    def _cut(self, target: Target) -> tuple[int, ...]:
        sizes = self.sizes(target)
        if not self.is_even:
            return sizes
        part = -(-sum(sizes) // len(sizes))
        return tuple(min(part, sum(sizes) - i * part) for i in range(len(sizes)))


@dataclass(frozen=True)
class Joined(Assembly):
    """Several assemblies' results, one after the other along an axis of their own, which `axis` counts from the end."""

    parts: tuple[Assembly, ...]
    axis: int

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.patterns)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        return tuple(shape for part in self.parts for shape in part.shapes(self._without(target)))

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        at, inner = len(index) + self.axis, self._without(target)
        wanted = (*index[:at], *index[at + 1 :])
        remaining, parts = iter(tensors), []
        for part in self.parts:
            own = [next(remaining) for _ in part.names(inner)]
            parts.append((part, own))
        return stack([part.read(own, inner, wanted) for part, own in parts[index[at]]], axis=at)

    def _without(self, target: Target) -> Target:
        at = len(target.shape) + self.axis
        return replace(target, shape=(*target.shape[:at], *target.shape[at + 1 :]))


@dataclass(frozen=True)
class HeadRows(Assembly):
    """Some rows of each head, whose rows lie together in a torch Linear's weight [heads * rows, in], as [in, heads, *axes].

    Attributes:
        part: the first of a head's rows, and how many rows it has in all.
    """

    name: str
    axes: int
    part: Part

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        inputs, heads, _ = self._split(target.shape)
        return ((heads[0] * self.part(target)[1], *inputs),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        _, _, inner = self._split(target.shape)
        inputs, (heads,), others = self._split(index)
        start, rows = self.part(target)
        read = tensors[0]((slice(heads.start * rows, heads.stop * rows), *inputs)).T
        read = read.reshape(*read.shape[:-1], heads.stop - heads.start, rows)[..., start : start + math.prod(inner)]
        return read.reshape(*read.shape[:-1], *inner)[(..., *others)] if inner else read[..., 0]

    def _split(self, axes: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        at = len(axes) - self.axes - 1
        return axes[:at], axes[at : at + 1], axes[at + 1 :]


@dataclass(frozen=True)
class GatedQkv(Qkv):
    """As Qkv, but q's tensor holds a gate behind each head's q (Qwen3-Next)."""

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        (rows, *inputs), k, v = super().shapes(target)
        return (2 * rows, *inputs), k, v

    def _read_heads(
        self, tensors: Sequence[ReadTensor], tensor: int, head: int, count: int, head_dim: int, inputs: Sequence[slice]
    ) -> np.ndarray:
        if tensor > 0:
            return super()._read_heads(tensors, tensor, head, count, head_dim, inputs)
        both = super()._read_heads(tensors, tensor, 2 * head, 2 * count, head_dim, inputs)
        return both.reshape(count, 2, head_dim, *both.shape[1:])[:, 0].reshape(count * head_dim, *both.shape[1:])
