"""What checkpoints of one model may call otherwise, or leave out: the prefix of all names, and the head. Knows no file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jaxserve.models.families.assembly import Assembly
from jaxserve.models.loading.source import StoredTensor
from jaxserve.models.spec import DecoderSpec

_ROWS = 4096  # that are compared at once


def with_prefix[T](tensors: dict[str, T], table: Mapping[str, Assembly]) -> dict[str, T]:
    """The tensors under the names of the whole model: saved without its head, a model leaves out the first part of all names."""
    prefix = table["embed"].patterns[0].partition(".")[0] + "."
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    head = {name for path in ("lm_head", "head_bias") if path in table for name in table[path].patterns}
    return {name if name in head else prefix + name: tensor for name, tensor in tensors.items()}


def settle_head(
    tensors: dict[str, StoredTensor], table: Mapping[str, Assembly], spec: DecoderSpec
) -> tuple[dict[str, StoredTensor], DecoderSpec]:
    """Where the config ties embeddings and head, but the head is stored: as transformers does, each stays what the file says.

    Returns:
        The tensors without a head that is the embeddings, which it is itself where they are missing; and the spec, not tied
        if it is another.
    """
    (embed,), (head,) = table["embed"].patterns, table["lm_head"].patterns
    if not spec.tie_embeddings or head not in tensors:
        return tensors, spec
    if embed in tensors and not _are_equal(tensors[embed], tensors[head]):
        return tensors, replace(spec, tie_embeddings=False)
    others = {name: tensor for name, tensor in tensors.items() if name != head}
    return {embed: tensors[head]} | others, spec


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    rest = tuple(slice(0, size) for size in one.shape[1:])
    parts = ((slice(at, min(at + _ROWS, one.shape[0])), *rest) for at in range(0, one.shape[0], _ROWS))
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)
