"""A config's rope_parameters as a RopeSpec. What cannot be done is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import HfConfig
from jaxserve.models.families.from_config import head_dim, refuse
from jaxserve.models.spec import FactorScaling, LinearScaling, Llama3Scaling, RopeScaling, RopeSpec, YarnScaling

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "linear", "dynamic"), ("original_max_position_embeddings",)),  # which changes nothing there
    "yarn": ("finetuned", "factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", "attention_factor", "long_attention_factor"),
}


def rope(
    config: HfConfig,
    parameters: Mapping[str, Any] | None = None,
    *,
    dim: int | None = None,
    is_partial: bool = False,
    is_even: bool = False,
    interleaved: bool = False,
    read_elsewhere: tuple[str, ...] = (),
) -> RopeSpec:
    """The rope of a config.

    Args:
        parameters: a rope_parameters dict of transformers 5 (AutoConfig turns older forms into it); the config's own if not
            given.
        dim: of the heads; the config's head_dim if not given.
        is_partial: this model's code heeds partial_rotary_factor.
        is_even: it cannot turn an odd number of dimensions; elsewhere one more is turned, by frequencies of the odd number.
        interleaved: as in RopeSpec.
        read_elsewhere: fields that the family itself reads.
    """
    parameters = config.rope_parameters if parameters is None else parameters
    fields = {name: value for name, value in parameters.items() if value is not None and name not in read_elsewhere}
    kind = fields.pop("rope_type", "default")
    if fields.pop("type", kind) != kind or kind not in _NEEDED:
        raise ModelLoadError(f"rope type {parameters} is not supported; jaxserve can do {', '.join(_NEEDED)}")
    theta, part = fields.pop("rope_theta", None), fields.pop("partial_rotary_factor", 1.0)
    if part != 1.0 and not is_partial:
        raise ModelLoadError(f"rope over part of each head is not supported for this model; got {parameters}")
    needed, unknown = _NEEDED[kind], set(fields) - {*_NEEDED[kind], *_OPTIONAL.get(kind, ())}
    if theta is None or unknown or not set(needed) <= set(fields):
        raise ModelLoadError(f"rope type {kind!r} takes {', '.join(('rope_theta', *needed))}; got {parameters}")
    named = rotary_dim = int((dim or head_dim(config)) * part)
    if is_partial and not is_even and kind != "yarn":
        rotary_dim += named % 2
    return RopeSpec(
        theta=float(theta),
        rotary_dim=rotary_dim,
        frequency_dim=None if named == rotary_dim else named,
        scaling=_scaling(config, kind, fields, rotary_dim),
        interleaved=interleaved,
    )


def proportional_rope(config: HfConfig, parameters: Mapping[str, Any], dim: int) -> RopeSpec:
    """A rope that may be "proportional": the later pairs of a head stand still, and the earlier ones turn as if all did."""
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    unknown = set(parameters) - {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
    if unknown or kind not in ("default", "proportional"):
        raise ModelLoadError(
            f"{config.model_type} with rope_parameters {parameters} is not supported; jaxserve can do default and proportional"
        )
    if kind == "default":
        refuse(SimpleNamespace(model_type=config.model_type, **parameters), partial_rotary_factor=1.0, factor=1.0)
        return RopeSpec(theta=theta, rotary_dim=dim)
    turning = int(parameters.get("partial_rotary_factor", 1.0) * dim // 2)
    factors = (float(parameters.get("factor", 1.0)),) * turning + (math.inf,) * (dim // 2 - turning)
    return RopeSpec(theta=theta, rotary_dim=dim, scaling=FactorScaling(factors=factors))


def _scaling(config: HfConfig, kind: str, fields: Mapping[str, Any], rotary_dim: int) -> RopeScaling | None:
    if kind == "linear":
        return LinearScaling(factor=float(fields["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_position=int(fields["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return _yarn(config, fields)
    if kind == "longrope":
        return _longrope(config, fields, rotary_dim)
    return None  # dynamic NTK scales only what lies past max_position_embeddings


def _yarn(config: HfConfig, fields: Mapping[str, Any]) -> YarnScaling:
    original = fields["original_max_position_embeddings"]
    factor = float(fields.get("factor") or config.max_position_embeddings / original)
    attention, top, all_dim = (fields.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = yarn_mscale(factor, top) / yarn_mscale(factor, all_dim) if top and all_dim else yarn_mscale(factor)
    return YarnScaling(
        factor=factor,
        original_max_position=int(original),
        beta_fast=float(fields.get("beta_fast") or 32),
        beta_slow=float(fields.get("beta_slow") or 1),
        attention_factor=float(attention),
        truncate=bool(config.rope_parameters.get("truncate", True)),
    )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much attention is sharpened for a context longer by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(config: HfConfig, fields: Mapping[str, Any], rotary_dim: int) -> FactorScaling:
    original = fields["original_max_position_embeddings"]
    factor = fields.get("factor") or config.max_position_embeddings / original
    attention = fields.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (_factors(fields, name, rotary_dim) for name in ("short_factor", "long_factor"))
    longer = FactorScaling(factors=long, attention_factor=float(fields.get("long_attention_factor", attention)))
    return FactorScaling(factors=short, attention_factor=float(attention), context=int(original), longer=longer)


def _factors(fields: Mapping[str, Any], name: str, rotary_dim: int) -> tuple[float, ...]:
    if len(fields[name]) != rotary_dim // 2:
        raise ModelLoadError(f"rope's {name} must have {rotary_dim // 2} numbers; got {len(fields[name])}")
    return tuple(map(float, fields[name]))
