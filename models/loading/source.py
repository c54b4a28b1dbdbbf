"""ModelSource: an opened checkpoint, whatever its format. Tensors carry the names and shapes that Hugging Face gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Index, Shape
from jaxserve.models.loading.checkpoint_quantization import CheckpointQuantization
from jaxserve.models.spec import DecoderSpec


class StoredTensor(Protocol):
    """A tensor of a checkpoint, read in parts."""

    @property
    def shape(self) -> Shape: ...

    def read(self, index: Index) -> np.ndarray:
        """The part, in float32, bfloat16 or float16; it may be mapped from the file, and must not be written to."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """An opened checkpoint.

    Attributes:
        path: the folder or file.
        kind: "dummy" has a config, but no tensors.
        config: as transformers understands it.
        generation_config: the model's own sampling defaults; eos_token_id (an int or a list) comes from the config where
            generation_config.json has none.
        checkpoint_dtype: of most of the weights.
        tensors: by the names that the architecture's table uses.
        quantization: of the checkpoint, where its weights are of 8 bits.
    """

    path: Path
    kind: Literal["safetensors", "gguf", "converted", "dummy"]
    architecture: Architecture
    config: HfConfig
    spec: DecoderSpec
    generation_config: Mapping[str, Any]
    checkpoint_dtype: str
    tensors: Mapping[str, StoredTensor]
    quantization: CheckpointQuantization | None = None
