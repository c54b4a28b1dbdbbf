"""Which architectures jaxserve knows. A new one is a page under families/ and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families import (
    alibi,
    deepseek,
    gated_delta,
    gemma,
    gemma3n,
    gpt,
    gpt_oss,
    hybrid_mamba,
    kimi_linear,
    laguna,
    layer_norm,
    lfm2,
    llama,
    longcat,
    mamba,
    mimo,
    minimax,
    moe,
    odd_attention,
    olmo,
    olmo_hybrid,
    recurrent_gemma,
    rwkv,
    text_parts,
    zamba2,
)
from jaxserve.models.families.architecture import Architecture

_FAMILIES = (
    llama,
    gemma,
    gemma3n,
    olmo,
    layer_norm,
    gpt,
    alibi,
    odd_attention,
    moe,
    deepseek,
    gpt_oss,
    laguna,
    longcat,
    mimo,
    mamba,
    hybrid_mamba,
    zamba2,
    gated_delta,
    olmo_hybrid,
    kimi_linear,
    lfm2,
    recurrent_gemma,
    rwkv,
    minimax,
    text_parts,
)
ARCHITECTURES: tuple[Architecture, ...] = tuple(a for family in _FAMILIES for a in family.ARCHITECTURES)


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names: by its model class, or by its model_type where it names no class.

    Raises:
        ModelLoadError: if it is none of those known.
    """
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if architecture.name in names or (not names and architecture.model_type == model_type):
            return architecture
    wanted = ", ".join(map(str, names)) or f"model_type {model_type!r}"
    alike = difflib.get_close_matches(wanted, [architecture.name for architecture in ARCHITECTURES], n=3)
    hint = f" Of like name: {', '.join(alike)}." if alike else ""
    raise ModelLoadError(f"the model's architecture is not supported: {wanted}.{hint} `jaxserve models` lists all that are.")
