"""Reads the fields that Hugging Face configs of many families share. What cannot be done is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import HfConfig
from jaxserve.models.spec import Activation, LinearScaling, Llama3Scaling, MlpSpec, RopeScaling, RopeSpec

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def refuse(config: HfConfig, **allowed: Any) -> None:
    """Refuses a config that sets one of these fields to anything but the allowed value (or leaves it out)."""
    for name, value in allowed.items():
        got = getattr(config, name, value)
        if got != value and got is not None:
            raise ModelLoadError(f"{config.model_type} with {name}={got!r} is not supported; jaxserve can do {name}={value!r}")


def head_dim(config: HfConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(parameters: Mapping[str, Any], dim: int) -> RopeSpec:
    """A rope_parameters dict of transformers 5 (AutoConfig turns older forms into it) for heads of `dim`."""
    fields = {name: value for name, value in parameters.items() if value is not None}
    kind = fields.pop("rope_type", "default")
    if fields.pop("type", kind) != kind or kind not in _SCALING_FIELDS:
        raise ModelLoadError(f"rope type {parameters} is not supported; jaxserve can do {', '.join(_SCALING_FIELDS)}")
    theta = fields.pop("rope_theta", None)
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"rope over part of each head is not supported for this model; got {parameters}")
    wanted = _SCALING_FIELDS[kind]
    if theta is None or set(fields) != set(wanted):
        raise ModelLoadError(f"rope type {kind!r} takes {', '.join(('rope_theta', *wanted))}; got {parameters}")
    return RopeSpec(theta=float(theta), rotary_dim=dim, scaling=_scaling(kind, fields))


def _scaling(kind: str, fields: Mapping[str, Any]) -> RopeScaling | None:
    if kind == "linear":
        return LinearScaling(factor=float(fields["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_position=int(fields["original_max_position_embeddings"]),
        )
    return None


def activation(name: str) -> Activation:
    """What transformers calls `name`."""
    if name not in _ACTIVATIONS:
        raise ModelLoadError(f"activation {name!r} is not supported; jaxserve can do {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def gated_mlp(config: HfConfig, act: str, *, bias: bool = False) -> MlpSpec:
    return MlpSpec(dim=config.intermediate_size, activation=activation(act), bias=bias)


def windows(config: HfConfig) -> Sequence[int | None]:
    """The window of each layer, from layer_types; None where a layer attends to everything."""
    types = config.layer_types
    if len(types) != config.num_hidden_layers:
        raise ModelLoadError(f"layer_types names {len(types)} layers, num_hidden_layers is {config.num_hidden_layers}")
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelLoadError(
            f"layer types {sorted(unknown)} are not supported; jaxserve can do full_attention, sliding_attention"
        )
    if "sliding_attention" in types and not config.sliding_window:
        raise ModelLoadError(f"layer_types has sliding_attention, but sliding_window is {config.sliding_window!r}")
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]
