"""What a model's own files say beyond its layers: its tokenizer, the ids that end a text, how it likes to be sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.config import EngineConfig
from jaxserve.models.loading import ModelSource
from jaxserve.models.loading.resolve import resolve_model

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


def load_tokenizer(config: EngineConfig, source: ModelSource) -> Tokenizer | None:
    if config.model.skip_tokenizer_init or (source.kind == "dummy" and config.model.tokenizer is None):
        return None
    from jaxserve import tokenizer

    return tokenizer.load_tokenizer(resolve_model(config.model.tokenizer) if config.model.tokenizer else source.path)


def eos_token_ids(source: ModelSource, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every id that ends a text."""
    declared = source.generation_config.get("eos_token_id")
    ids = frozenset(declared if isinstance(declared, list) else [] if declared is None else [declared])
    return ids if tokenizer is None else ids.union(tokenizer.end_token_ids)


def default_sampling(config: EngineConfig, source: ModelSource) -> dict[str, Any]:
    if config.model.generation_config == "none":
        return {}
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: source.generation_config.get(name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
