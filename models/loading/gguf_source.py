"""A GGUF file as a ModelSource: tensors under their Hugging Face names, with llama.cpp's changes to them undone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.models.families.architecture import Architecture
from jaxserve.models.families.assembly import Index, Shape, known_names
from jaxserve.models.loading.gguf_config import config_from_gguf
from jaxserve.models.loading.gguf_file import GgufFile, GgufTensor, open_gguf
from jaxserve.models.loading.hf_config import understand_config
from jaxserve.models.loading.source import ModelSource, StoredTensor
from jaxserve.models.spec import DecoderSpec

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
}
_QK_PROJECTION = re.compile(r"\.[qk]_proj\.(weight|bias)$")
_CONFIG_TENSORS = {"rope_freqs.weight"}  # read by config_from_gguf


@dataclass(frozen=True)
class RestoredTensor:
    """A GGUF tensor with the values that the Hugging Face checkpoint has.

    Attributes:
        row_order: which row of the file holds each row; None for the file's own order.
        offset: to add to each value.
    """

    stored: GgufTensor
    row_order: np.ndarray | None
    offset: float

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    def read(self, index: Index) -> np.ndarray:
        if len(self.shape) == 1:  # stored as one row
            values: np.ndarray = self.stored.rows(slice(None))[0]
            values = (values if self.row_order is None else values[self.row_order])[index]
        else:
            rows, *rest = index
            values = self.stored.rows(rows if self.row_order is None else self.row_order[rows])[(slice(None), *rest)]
        if self.offset:
            values += np.float32(self.offset)
        return values


def open_gguf_source(path: Path, *, dummy: bool) -> ModelSource:
    """Opens a .gguf file.

    Args:
        dummy: give the config only.

    Raises:
        ModelLoadError: if the file is broken, or holds what cannot be done.
    """
    file = open_gguf(path)
    architecture, config, spec = understand_config(config_from_gguf(file))
    tensors = {} if dummy else dict(_restored(file, architecture, spec))
    return ModelSource(
        path, "dummy" if dummy else "gguf", architecture, config, spec, _generation_defaults(file), "bfloat16", tensors
    )


def _restored(file: GgufFile, architecture: Architecture, spec: DecoderSpec) -> Iterator[tuple[str, StoredTensor]]:
    hf_names = _hf_names(file, architecture, spec)
    is_llama = file.metadata["general.architecture"] == "llama"
    is_gemma = file.metadata["general.architecture"].startswith("gemma")
    attention = spec.layers[0].attention
    assert attention is not None, "every architecture that GGUF files are read for has attention"
    head_dim = attention.head_dim
    for name, tensor in file.tensors.items():
        if name in _CONFIG_TENSORS:
            continue
        order = None
        hf_name = hf_names.get(name, name)
        if is_llama and _QK_PROJECTION.search(hf_name) and tensor.shape[0] % head_dim == 0:  # else it is refused later
            order = _rope_order(head_dim, tensor.shape[0])
        offset = -1.0 if is_gemma and name.endswith("norm.weight") else 0.0  # llama.cpp stores Gemma's 1 + weight
        yield hf_name, RestoredTensor(tensor, order, offset)


def _rope_order(head_dim: int, num_rows: int) -> np.ndarray:
    """Where q's and k's rows are: llama.cpp pairs neighbours in a head for its rope, Hugging Face the head's halves."""
    rows = np.arange(num_rows).reshape(-1, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _hf_names(file: GgufFile, architecture: Architecture, spec: DecoderSpec) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor that the architecture may have."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[file.metadata["general.architecture"]]
    gguf_names = get_tensor_name_map(arch, len(spec.layers))
    names = {}
    for pattern in known_names(architecture.table(spec).values()):
        for layer in range(len(spec.layers)) if "{i}" in pattern else range(1):
            hf_name = pattern.replace("{i}", str(layer))
            gguf_name = gguf_names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            if gguf_name:
                names[gguf_name] = hf_name
    return names


def _generation_defaults(file: GgufFile) -> dict[str, Any]:
    ends = [file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    defaults = {hf: file.metadata[name] for name, hf in _SAMPLING.items() if name in file.metadata}
    return defaults | ({"eos_token_id": found} if found else {})
