"""How q, k and v projections of a checkpoint, apart or fused in one of many ways, make up one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxserve.models.families.assembly import Assembly, Index, ReadTensor, Shape, Target, aligned, as_bits, whole
from jaxserve.models.spec import MlaSpec

QkvLayout = Literal["apart", "concatenated", "grouped", "codegen"]
_CODEGEN_SHARDS = 4  # CodeGen's checkpoints are laid out for so many devices


@dataclass(frozen=True)
class Qkv(Assembly):
    """q [N*H, D], k and v [K*H, D] as [D, K, G + 2, H], or their biases as [K, G + 2, H]; kv heads repeated as the spec says.

    Attributes:
        tensors: q, k and v, or the one that holds all three.
        layout: three tensors; q, k and v one after the other; each kv head's queries, key and value together (GPT-NeoX,
            Falcon); or CodeGen's shards of q, v and k.
        is_transposed: the checkpoint has [in, out] (GPT-2's Conv1D).
    """

    tensors: tuple[str, ...]
    layout: QkvLayout = "apart"
    is_transposed: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.tensors

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        mixer, inputs = target.attention, target.shape[:-3]
        q, kv = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        rows = (q, kv, kv) if self.layout == "apart" else (q + 2 * kv,)
        return tuple((*inputs, n) if self.is_transposed else (n, *inputs) for n in rows)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        mixer, repeat = target.attention, target.attention.kv_repeat
        *inputs, heads, group, dims = index
        first, last = heads.start // repeat, -(-heads.stop // repeat)  # kv heads of the checkpoint
        copies = np.arange(heads.start, heads.stop) // repeat - first

        def read(part: int, start: int, stop: int) -> np.ndarray:
            """Rows of the part's heads, [heads, H, *inputs]; a view of [*inputs, heads * H] if the checkpoint has that."""
            runs = [self._read_heads(tensors, *run, mixer.head_dim, inputs) for run in self._runs(target, part, start, stop)]
            rows = np.concatenate(runs, axis=-1 if self.is_transposed else 0) if len(runs) > 1 else runs[0]
            rows = np.moveaxis(rows, -1, 0) if self.is_transposed else rows
            return rows.reshape(-1, mixer.head_dim, *rows.shape[1:])

        q = read(0, heads.start * mixer.group_size, heads.stop * mixer.group_size)
        k, v = (read(part, first, last) for part in (1, 2))
        by_head = self._empty((len(copies), mixer.group_size + 2, *q.shape[1:]), q.dtype)
        bits, (q, k, v) = as_bits(by_head), map(as_bits, (q, k, v))
        for i, copy in enumerate(copies.tolist()):
            bits[i, :-2] = q[i * mixer.group_size : (i + 1) * mixer.group_size]
            bits[i, -2], bits[i, -1] = k[copy], v[copy]
        return np.moveaxis(by_head, (0, 1, 2), (-3, -2, -1))[..., group, dims]

    def _empty(self, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """[heads, group, H, *inputs], in memory with the inputs where the checkpoint has them."""
        if not self.is_transposed:
            return aligned(shape, dtype)
        return np.moveaxis(aligned((*shape[3:], *shape[:3]), dtype), (-3, -2, -1), (0, 1, 2))

    def _read_heads(
        self, tensors: Sequence[ReadTensor], tensor: int, head: int, count: int, head_dim: int, inputs: Sequence[slice]
    ) -> np.ndarray:
        """Rows of `count` heads that lie together in one tensor."""
        rows = slice(head * head_dim, (head + count) * head_dim)
        return tensors[tensor]((*inputs, rows) if self.is_transposed else (rows, *inputs))

    def _runs(self, target: Target, part: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(tensor, first head in it, how many) of the q (part 0), k (1) or v (2) heads start to stop."""
        if self.layout == "apart":
            return [(part, start, stop - start)]
        at = [self._place(target, part, head) for head in range(start, stop)]
        runs: list[tuple[int, int, int]] = []
        for place in at:
            if runs and runs[-1][1] + runs[-1][2] == place:
                runs[-1] = (0, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((0, place, 1))
        return runs

    def _place(self, target: Target, part: int, head: int) -> int:
        """Which head of the fused tensor is the q, k or v head."""
        mixer = target.attention
        num_heads, kv_heads = mixer.num_heads, mixer.num_kv_heads
        if self.layout == "concatenated":
            return head + (0, num_heads, num_heads + kv_heads)[part]
        if self.layout == "grouped":
            group = num_heads // kv_heads
            in_group = (head % group, group, group + 1)[part]
            return (head // group if part == 0 else head) * (group + 2) + in_group
        per_shard = num_heads // _CODEGEN_SHARDS
        return head // per_shard * 3 * per_shard + (0, 2, 1)[part] * per_shard + head % per_shard


@dataclass(frozen=True)
class KvHeads(Assembly):
    """k or v [K*H, D] as [D, K, H], or its bias as [K, H]; kv heads repeated as the spec says."""

    name: str

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        *inputs, _, dim = target.shape
        return ((target.attention.num_kv_heads * dim, *inputs),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        repeat, dim = target.attention.kv_repeat, target.shape[-1]
        *inputs, heads, dims = index
        first, last = heads.start // repeat, -(-heads.stop // repeat)  # heads of the checkpoint
        rows = tensors[0]((slice(first * dim, last * dim), *inputs))
        by_head = rows.reshape(last - first, dim, *rows.shape[1:])
        copied = by_head if repeat == 1 else by_head[np.arange(heads.start, heads.stop) // repeat - first]
        return np.moveaxis(copied, (0, 1), (-2, -1))[..., dims]


@dataclass(frozen=True)
class LatentUp(Assembly):
    """Keys' or values' part of [N * (nope + v), R], as [N, nope, R] or [N, R, v] (multi-head latent attention)."""

    name: str
    part: Literal["keys", "values"]

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        mla = self._mla(target)
        return ((mla.num_heads * (mla.nope_dim + mla.v_dim), mla.kv_rank),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        mla, heads = self._mla(target), index[0]
        step = mla.nope_dim + mla.v_dim
        rows = tensors[0]((slice(heads.start * step, heads.stop * step), slice(0, mla.kv_rank)))
        rows = rows.reshape(-1, step, mla.kv_rank)
        part = rows[:, : mla.nope_dim] if self.part == "keys" else rows[:, mla.nope_dim :].swapaxes(1, 2)
        return part[(slice(None), *index[1:])]

    @staticmethod
    def _mla(target: Target) -> MlaSpec:
        assert target.layer is not None and isinstance(target.layer.mixer, MlaSpec), target.path
        return target.layer.mixer


@dataclass(frozen=True)
class HeadNorm(Assembly):
    """The gain of a norm that each head has its own of, [heads, H]; kv heads repeated as the spec says.

    Attributes:
        form: the checkpoint has [heads, H], or [heads * H], or a tensor [H] for each head, "{h}" in its name.
    """

    name: str
    form: Literal["heads", "flat", "apart"]

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.name,)

    def names(self, target: Target) -> tuple[str, ...]:
        heads = self._heads(target)[0]
        return tuple(self.name.replace("{h}", str(h)) for h in range(heads if self.form == "apart" else 1))

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        heads, head_dim = self._heads(target)[0], target.shape[1]
        if self.form == "apart":
            return ((head_dim,),) * heads
        return ((heads * head_dim,) if self.form == "flat" else (heads, head_dim),)

    def read(self, tensors: Sequence[ReadTensor], target: Target, index: Index) -> np.ndarray:
        values = [whole(read, shape) for read, shape in zip(tensors, self.shapes(target), strict=True)]
        heads = np.stack(values) if self.form == "apart" else values[0].reshape(-1, target.shape[1])
        return np.repeat(heads, self._heads(target)[1], axis=0)[index]

    @staticmethod
    def _heads(target: Target) -> tuple[int, int]:
        """Heads of the checkpoint, and how often we have each."""
        repeat = target.attention.kv_repeat if ".k_norm." in target.path else 1
        return target.shape[0] // repeat, repeat
