"""Reads the fields that Hugging Face configs of many families share. What cannot be done is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import HfConfig
from jaxserve.models.spec import (
    Activation,
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MixerSpec,
    MlpSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
)

_ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}


def refuse(config: HfConfig, **allowed: Any) -> None:
    """Refuses a config that sets one of these fields to anything but the allowed value (or leaves it out)."""
    for name, value in allowed.items():
        got = getattr(config, name, value)
        if got != value and got is not None:
            of = config.model_type or type(config).__name__
            raise ModelLoadError(f"{of} with {name}={got!r} is not supported; jaxserve can do {name}={value!r}")


def head_dim(config: HfConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: HfConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ModelLoadError(f"activation {name!r} is not supported; jaxserve can do {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def mlp(config: HfConfig, dim: int | None = None, **changes: Any) -> MlpSpec:
    """The feed-forward block that hidden_act and intermediate_size describe."""
    fields: dict[str, Any] = {"dim": config.intermediate_size if dim is None else dim}
    if "activation" not in changes:
        fields["activation"] = activation(config.hidden_act)
    return MlpSpec(**fields | changes)


def windows(config: HfConfig) -> Sequence[int | None]:
    """The window of each layer, from layer_types; None where a layer attends to everything."""
    types = layer_types(config, "full_attention", "sliding_attention")
    if "sliding_attention" in types and not config.sliding_window:
        raise ModelLoadError(f"layer_types has sliding_attention, but sliding_window is {config.sliding_window!r}")
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def layer_types(config: HfConfig, *allowed: str) -> Sequence[str]:
    """layer_types, one for each layer and of these kinds."""
    types: Sequence[str] = config.layer_types
    if len(types) != config.num_hidden_layers:
        raise ModelLoadError(f"layer_types names {len(types)} layers, num_hidden_layers is {config.num_hidden_layers}")
    unknown = set(types) - set(allowed)
    if unknown:
        raise ModelLoadError(f"layer types {sorted(unknown)} are not supported; jaxserve can do {', '.join(allowed)}")
    return types


def one_window(config: HfConfig) -> Sequence[int | None]:
    """The same sliding_window, which may be None, in every layer."""
    return [config.sliding_window] * config.num_hidden_layers


def attention(config: HfConfig, rope: RopeSpec | None, **changes: Any) -> AttentionSpec:
    """The attention that num_attention_heads, num_key_value_heads and head_dim describe."""
    dim = head_dim(config)
    fields: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": kv_heads(config),
        "head_dim": dim,
        "scale": dim**-0.5,
    }
    return AttentionSpec(rope=rope, **fields | changes)


def decoder(
    config: HfConfig,
    norm: NormSpec,
    mixer: Callable[[int], MixerSpec],
    mlp: MlpSpec | MoeSpec | Callable[[int], MlpSpec | MoeSpec],
    **changes: Any,
) -> DecoderSpec:
    """A decoder of num_hidden_layers layers.

    Args:
        mixer, mlp: of each layer, from its number.
        changes: fields of DecoderSpec that are not the usual ones.
    """
    of_layer = mlp if callable(mlp) else lambda layer: mlp
    layers = (LayerSpec(mixer=mixer(i), mlp=of_layer(i)) for i in range(config.num_hidden_layers))
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "tie_embeddings": bool(config.tie_word_embeddings),
        "max_position": getattr(config, "max_position_embeddings", None),
    }
    return DecoderSpec(norm=norm, layers=tuple(layers), **fields | changes)


def rms(config: HfConfig, **changes: Any) -> NormSpec:
    return NormSpec(eps=config.rms_norm_eps, **changes)


def layer_norm(eps: float, **changes: Any) -> NormSpec:
    return NormSpec(kind="layer", eps=eps, **{"bias": True} | changes)


def flags(config: HfConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a spec from fields of the config that say yes or no."""
    return {ours: bool(getattr(config, theirs, False)) for ours, theirs in names.items()}
