"""Architecture: one model class of Hugging Face as data. Knows no file format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.models.families.assembly import Assembly
from jaxserve.models.spec import DecoderSpec

HfConfig = Any  # a transformers.PreTrainedConfig; its attributes differ by model


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build and fill one Hugging Face model class.

    Attributes:
        name: what config.json calls it under `architectures`.
        model_type: what config.json calls its config.
        spec: makes the DecoderSpec, or raises ModelLoadError for what cannot be done.
        tensors: parameter path -> how checkpoint tensors make it up; "{i}" stands for the layer. Paths that a model
            does not have are skipped, so that one table serves many models. Or what makes the table from the spec.
        renames: prefix of a checkpoint's tensor names -> what to read it as.
        ignored: prefixes of tensor names that this model does not need.
        unread: a pattern of other names that it does not need.
        verify: raises ModelLoadError for tensors that must hold what the config says, and do not.
        spare: a pattern of names that it may or may not need: those left over are no error.
    """

    name: str
    model_type: str
    spec: Callable[[HfConfig], DecoderSpec]
    tensors: Mapping[str, Assembly] | Callable[[DecoderSpec], Mapping[str, Assembly]]
    renames: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unread: str = ""
    spare: str = ""
    verify: Callable[[DecoderSpec, Mapping[str, Any]], None] = lambda spec, tensors: None

    def table(self, spec: DecoderSpec) -> Mapping[str, Assembly]:
        """`tensors` of a model with this spec."""
        return self.tensors(spec) if callable(self.tensors) else self.tensors

    def is_needed(self, name: str) -> bool:
        """Whether the model has a use for a checkpoint's tensor."""
        return not (name.startswith(self.ignored) or (self.unread and re.search(self.unread, name)))

    def read_name(self, name: str) -> str:
        """The name under which `tensors` knows a checkpoint's tensor."""
        for prefix, new in self.renames.items():
            if name.startswith(prefix):
                return new + name.removeprefix(prefix)
        return name
