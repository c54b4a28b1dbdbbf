"""The config of a model: a config.json's dict, through transformers, to an architecture and its DecoderSpec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.registry import find_architecture
from jaxserve.models.spec import DecoderSpec

_DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}  # as one family or another calls it
_NOT_FIELDS = ("model_type", "auto_map", "quantization_config", "compression_config")
_MAX_LAYERS = 1000  # a damaged config must not keep us busy for hours


def understand_config(raw: Mapping[str, Any]) -> tuple[Architecture, HfConfig, DecoderSpec]:
    """Finds the architecture that a config.json names, and what it says for it.

    Code that a model brings along (auto_map) is never run.

    Raises:
        ModelLoadError: for an unknown architecture, or for a field whose value cannot be done.
    """
    architecture = find_architecture(raw)
    if raw.get("model_type", architecture.model_type) != architecture.model_type:
        raise ModelLoadError(
            f"config.json names {architecture.name} with model_type {raw['model_type']!r}; wanted {architecture.model_type!r}"
        )
    text_config = raw.get("text_config")
    own = text_config if isinstance(text_config, Mapping) else raw
    for name in _DEPTHS & own.keys():
        check_depth(own[name])
    try:
        config = _make_config(architecture.model_type, raw)
        return architecture, config, architecture.spec(config)
    except ModelLoadError:
        raise
    except Exception as e:  # transformers checks fields with errors of many kinds
        raise ModelLoadError(f"the model's config does not make sense for {architecture.name}: {e}") from e


def check_depth(num_layers: object) -> None:
    """Refuses a number of layers that no model has, before anything is made for each of them."""
    if not isinstance(num_layers, int) or not 1 <= num_layers <= _MAX_LAYERS:
        raise ModelLoadError(
            f"the number of layers must be from 1 to {_MAX_LAYERS}; got {num_layers!r}. Check the model's config."
        )


def _make_config(model_type: str, raw: Mapping[str, Any]) -> HfConfig:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that there is no torch
    from transformers import AutoConfig

    fields = _plain({name: value for name, value in raw.items() if name not in _NOT_FIELDS})
    return AutoConfig.for_model(model_type, **fields)


def _plain(value: Any) -> Any:
    """A copy, with numbers for what transformers writes for those that JSON does not have: {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def generation_defaults(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json's dict, with what ends a text from config.json where it says nothing of it."""
    text_config = raw.get("text_config") or {}
    eos = raw.get("eos_token_id", text_config.get("eos_token_id"))
    return ({} if eos is None else {"eos_token_id": eos}) | {k: v for k, v in generation.items() if v is not None}
