"""How tensors of a checkpoint make up one parameter. Works on slices, so that each device reads only its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxserve.models.spec import AttentionSpec, LayerSpec

Index = tuple[slice, ...]
"""Which part of an array is wanted: a contiguous range with start and stop on every axis."""

Shape = tuple[int, ...]
ReadTensor = Callable[[Index], np.ndarray]
"""Reads a part of one tensor of the checkpoint."""


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
        """The attention that the parameter belongs to."""
        assert self.layer is not None and self.layer.attention is not None, self.path
        return self.layer.attention


class Assembly(Protocol):
    """Makes a parameter from the checkpoint's tensors `names`; "{i}" in a name stands for the layer."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """The shapes that the tensors must have."""
        ...

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        """The wanted part of the parameter, in the checkpoint's dtype."""
        ...


@dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        return (target.shape,)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        return tensors[0](index)


@dataclass(frozen=True)
class Projection:
    """A torch Linear's weight [out, in] as [*in, out]; the inputs of an attention's output projection are [N, H]."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        *inputs, outputs = target.shape
        return ((outputs, int(np.prod(inputs))),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        first, *inner, outputs = index
        row = int(np.prod(target.shape[1:-1]))  # inputs for each step along the first axis
        part = transpose(tensors[0]((outputs, slice(first.start * row, first.stop * row))))
        part = part.reshape(-1, *target.shape[1:-1], part.shape[-1])
        return part[(slice(None), *inner)]


@dataclass(frozen=True)
class Stack:
    """Several Linears' weights [F, D] as [D, parts, F], or their biases [F] as [parts, F]."""

    names: tuple[str, ...]

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        *inputs, _, outputs = target.shape
        return ((outputs, *inputs),) * len(self.names)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        *inputs, parts, outputs = index
        read = [tensor((outputs, *inputs)) for tensor in tensors[parts]]
        out = np.empty((*read[0].shape[:0:-1], len(read), len(read[0])), read[0].dtype)
        for i, part in enumerate(read):
            transpose(part, out[..., i, :])
        return out


@dataclass(frozen=True)
class FusedQkv:
    """q [N*H, D], k and v [K*H, D] as [D, K, G + 2, H], or their biases as [K, G + 2, H]; kv heads repeated as the spec says."""

    names: tuple[str, str, str]

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        mixer, inputs = target.attention, target.shape[:-3]
        q, kv = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        return (q, *inputs), (kv, *inputs), (kv, *inputs)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        mixer, repeat = target.attention, target.attention.kv_repeat
        *inputs, heads, group, dims = index
        first, last = heads.start // repeat, -(-heads.stop // repeat)  # kv heads of the checkpoint
        copies = np.arange(heads.start, heads.stop) // repeat - first

        def read(tensor: ReadTensor, start: int, stop: int) -> np.ndarray:
            return tensor((slice(start * mixer.head_dim, stop * mixer.head_dim), *inputs))

        size = mixer.group_size * mixer.head_dim  # rows of q for each kv head
        q = read(tensors[0], heads.start * mixer.group_size, heads.stop * mixer.group_size)
        k, v = (read(tensor, first, last) for tensor in tensors[1:])
        out = np.empty((*q.shape[1:], len(copies), size + 2 * mixer.head_dim), q.dtype)
        for i, copy in enumerate(copies.tolist()):
            of_head = slice(copy * mixer.head_dim, (copy + 1) * mixer.head_dim)
            transpose(q[i * size : (i + 1) * size], out[..., i, :size])
            transpose(k[of_head], out[..., i, size : size + mixer.head_dim])
            transpose(v[of_head], out[..., i, size + mixer.head_dim :])
        return out.reshape(*out.shape[:-1], -1, mixer.head_dim)[..., group, dims]


def transpose(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """x with its axes reversed, in `out` if given. By blocks of rows, which is some five times as fast as numpy's own copy."""
    out = np.empty(x.shape[::-1], x.dtype) if out is None else out
    if x.ndim < 2:
        out[...] = x
        return out
    bits = np.dtype(f"u{x.dtype.itemsize}")  # numpy copies its own types without holding the interpreter's lock
    source, target = x.view(bits), out.view(bits)
    for start in range(0, len(x), 128):
        target[:, start : start + 128] = source[start : start + 128].T
    return out
