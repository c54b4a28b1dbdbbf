"""How tensors of a checkpoint make up one parameter. Works on slices, so that each device reads only its part.

Nothing is turned over here: a part that is stored [out, in] comes as a view [in, out], and whoever places it turns it over there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.spec import AttentionSpec, LayerSpec

Index = tuple[slice, ...]
"""Which part of an array is wanted: a contiguous range with start and stop on every axis."""

Shape = tuple[int, ...]
ReadTensor = Callable[[Index], np.ndarray]
"""Reads a part of one tensor of the checkpoint."""

ALIGNMENT = 64  # bytes; what JAX takes on a CPU as it is, without a copy
_HUGE_PAGE = 2**21  # bytes; NumPy asks the kernel for such pages


@dataclass(frozen=True)
class Target:
    """The parameter to make.

    Attributes:
        layer: the layer that it belongs to; None outside the layers.
    """

    path: str
    shape: Shape
    layer: LayerSpec | None

    @property
    def attention(self) -> AttentionSpec:
        """The layer's attention.

        Raises:
            ModelLoadError: it has none. Of a layer's forms the first is taken where a checkpoint has the tensors of none.
        """
        attention = None if self.layer is None else self.layer.attention
        if attention is None:
            raise ModelLoadError(
                f"the tensors of {self.path} are missing, or are those of attention, which the config has elsewhere"
            )
        return attention

    @property
    def num_experts(self) -> int:
        assert self.layer is not None and self.layer.experts is not None, self.path
        return self.layer.experts.num_experts


class Assembly(ABC):
    """Makes a parameter from the checkpoint's tensors."""

    @property
    @abstractmethod
    def patterns(self) -> tuple[str, ...]:
        """Names of the tensors; "{i}" stands for the layer and "{e}" for each expert in turn."""

    def names(self, target: Target) -> tuple[str, ...]:
        """Names of this target's tensors, "{i}" still in them."""
        return tuple(
            name.replace("{e}", str(e)) for name in self.patterns for e in range(target.num_experts if "{e}" in name else 1)
        )

    @abstractmethod
    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """The shapes that the tensors must have."""

    @abstractmethod
    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        """The wanted part of the parameter, in the checkpoint's dtype and in whatever order of memory costs least."""

    def choose(self, target: Target, shape_of: Callable[[str], Shape | None]) -> Assembly:
        """The assembly that a checkpoint needs, whose tensors have these shapes; None for a tensor that it does not have."""
        return self


@dataclass(frozen=True)
class OneOf(Assembly):
    """Checkpoints come in several forms: the first whose tensors are there."""

    forms: tuple[Assembly, ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.forms[0].patterns

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        return self.forms[0].shapes(target)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        return self.forms[0].read(tensors, target, index)

    def choose(self, target: Target, shape_of: Callable[[str], Shape | None]) -> Assembly:
        fitting = (form for form in self.forms if None not in map(shape_of, form.names(target)))
        return next(fitting, self.forms[0]).choose(target, shape_of)


@dataclass(frozen=True)
class Same(Assembly):
    """The tensor as it is, but for the way its axes are counted: [N, H] may be stored as [N * H].

    Attributes:
        shape: that the checkpoint has, made from the parameter's; None for the parameter's own.
    """

    name: str
    shape: Callable[[Shape], Shape] | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        return (target.shape if self.shape is None else self.shape(target.shape),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        if self.shape is None:
            return tensors[0](index)
        return whole(tensors[0], self.shape(target.shape)).reshape(target.shape)[index]


@dataclass(frozen=True)
class Projection(Assembly):
    """A torch Linear's weight [out, in] as [*in, *out], such as [N, H, D] of an attention's output projection.

    Attributes:
        num_inputs: how many of the parameter's leading axes are inputs; all but the last if not given.
        is_transposed: the checkpoint has [in, out] (GPT-2's Conv1D).
    """

    name: str
    num_inputs: int | None = None
    is_transposed: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def _split(self, target: Target) -> tuple[Shape, Shape]:
        at = len(target.shape) - 1 if self.num_inputs is None else self.num_inputs
        return target.shape[:at], target.shape[at:]

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        ins, outs = (int(np.prod(part)) for part in self._split(target))
        return ((ins, outs) if self.is_transposed else (outs, ins),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        ins, outs = self._split(target)
        rows, columns = _range(index[: len(ins)], ins), _range(index[len(ins) :], outs)
        part = tensors[0]((rows, columns)) if self.is_transposed else tensors[0]((columns, rows)).T
        counts = (index[0].stop - index[0].start, index[len(ins)].stop - index[len(ins)].start)
        part = part.reshape(counts[0], *ins[1:], counts[1], *outs[1:])
        inner = (slice(None), *index[1 : len(ins)], slice(None), *index[len(ins) + 1 :])
        return part[inner]


def _range(index: Index, shape: Shape) -> slice:
    """The flat range of a part whose first axis is cut; the axes behind it are read whole."""
    step = int(np.prod(shape[1:]))
    return slice(index[0].start * step, index[0].stop * step)


@dataclass(frozen=True)
class Stack(Assembly):
    """Several Linears' weights [F, D] as [D, parts, F], or their biases [F] as [parts, F]."""

    tensors: tuple[str, ...]
    is_transposed: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.tensors

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        *inputs, _, outputs = target.shape
        return ((*inputs, outputs) if self.is_transposed else (outputs, *inputs),) * len(self.tensors)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        *inputs, parts, outputs = index
        if self.is_transposed:
            return stack([read((*inputs, outputs)) for read in tensors[parts]], axis=-2)
        return stack([read((outputs, *inputs)).T for read in tensors[parts]], axis=-2)


@dataclass(frozen=True)
class Halves(Assembly):
    """Gate and up in one tensor [2 F, D], gate first (or up, if swapped), as [D, 2, F]; or their biases [2 F] as [2, F]."""

    name: str
    is_swapped: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        *inputs, parts, outputs = target.shape
        return ((parts * outputs, *inputs),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        *inputs, parts, outputs = index
        dim = target.shape[-1]
        order = (1, 0) if self.is_swapped else (0, 1)
        starts = [order[part] * dim for part in range(parts.start, parts.stop)]
        return stack([tensors[0]((slice(at + outputs.start, at + outputs.stop), *inputs)).T for at in starts], axis=-2)


@dataclass(frozen=True)
class Derived(Assembly):
    """Small tensors, read whole, and what a function makes of them.

    Attributes:
        tensors: patterns of names.
        wanted: their shapes.
        make: the whole parameter.
    """

    tensors: tuple[str, ...]
    wanted: Callable[[Target], tuple[Shape, ...]]
    make: Callable[[list[np.ndarray], Target], np.ndarray]

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.tensors

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        return self.wanted(target)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        values = [whole(read, shape) for read, shape in zip(tensors, self.shapes(target), strict=True)]
        return self.make(values, target).reshape(target.shape)[index]


def whole(read: ReadTensor, shape: Shape) -> np.ndarray:
    """All of a tensor."""
    return read(tuple(slice(0, n) for n in shape))


def known_names(assemblies: Collection[Assembly]) -> list[str]:
    """Every pattern that a table's assemblies may read."""
    forms = (form for a in assemblies for form in (a.forms if isinstance(a, OneOf) else (a,)))
    return [pattern for form in forms for pattern in form.patterns]


def stack(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """np.stack, in the order of memory that the parts have: theirs is copied piece by piece, and a single one not at all."""
    if len(parts) == 1:
        return np.expand_dims(parts[0], axis)
    order = memory_order(parts[0])
    in_order = [as_bits(part).transpose(order) for part in parts]
    stored = np.stack(in_order, out=aligned((len(parts), *in_order[0].shape), in_order[0].dtype)).view(parts[0].dtype)
    return np.moveaxis(stored.transpose(0, *(1 + np.argsort(order))), 0, axis)


def as_bits(x: np.ndarray) -> np.ndarray:
    """The same memory, of a type that numpy knows itself: with those it lets other threads run while it copies."""
    return x.view(f"u{x.itemsize}")


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty array whose memory starts as JAX wants it, and a large one's with a huge page, else its ends are of small ones."""
    size = int(np.prod(shape)) * dtype.itemsize
    alignment = _HUGE_PAGE if size >= 2 * _HUGE_PAGE else ALIGNMENT
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def memory_order(x: np.ndarray) -> tuple[int, ...]:
    """x's axes from the one with the longest steps through memory to the one with the shortest."""
    return tuple(sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])))
