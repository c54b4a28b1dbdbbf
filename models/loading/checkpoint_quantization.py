"""What config.json's quantization_config says: floats of 8 or 4 bits in a few forms; all else is refused by name. Reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.errors import ModelLoadError

_COMPRESSED_FIELDS = {"quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version"}
_COMPRESSED_FIELDS |= {"global_compression_ratio", "sparsity_config", "transform_config"}
_FP8_FIELDS = {"quant_method", "activation_scheme", "weight_block_size", "fmt", "dequantize", "scale_fmt", "kv_cache_scheme"}
_FP8_FIELDS |= {"modules_to_not_convert", "ignored_layers", "modules_to_convert", "expert_dtype"}
_MXFP4_FIELDS = {"quant_method", "modules_to_not_convert", "dequantize"}
_FP8_VALUES = {"fmt": "e4m3", "expert_dtype": "fp8"}

Activations = Literal["token", "static", "plain"]


@dataclass(frozen=True)
class CheckpointQuantization:
    """How the 8-bit weights of a checkpoint are meant to be multiplied.

    Attributes:
        activations: rounded with a scale for each token; with the one that each weight brings; or not at all.
        block: rows and columns that share a scale, where weights are cut into blocks.
        has_kv_scales: it brings scales for 8-bit keys and values.
    """

    activations: Activations
    block: tuple[int, int] | None = None
    has_kv_scales: bool = False


def read_quantization(raw: Mapping[str, Any]) -> CheckpointQuantization | None:
    """From config.json; None for a checkpoint that is not quantised. Which tensors are, their own dtypes say.

    Raises:
        ModelLoadError: for a quantisation that cannot be done.
    """
    text_config = raw.get("text_config")
    places = (raw, text_config if isinstance(text_config, Mapping) else {})
    found = [place[key] for place in places for key in ("quantization_config", "compression_config") if place.get(key)]
    if not found:
        return None
    fields = found[0]
    method = fields.get("quant_method") if isinstance(fields, Mapping) else fields
    if method == "compressed-tensors":
        return _compressed(fields)
    if method == "fp8":
        return _fp8(fields)
    if method == "mxfp4":
        _refuse_unknown(fields, _MXFP4_FIELDS)
        return CheckpointQuantization("plain", (1, 32))
    raise _refusal(f"quant_method {method!r}", "compressed-tensors and fp8 (e4m3 weights), and mxfp4")


def _compressed(fields: Mapping[str, Any]) -> CheckpointQuantization:
    _refuse_unknown(fields, _COMPRESSED_FIELDS)
    form = fields.get("format")
    if form not in ("float-quantized", "naive-quantized"):
        raise _refusal(f"format {form!r}", "float-quantized")
    sparsity = fields.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _refusal(f"sparsity_config {sparsity}", "dense weights")
    if fields.get("transform_config"):
        raise _refusal(f"transform_config {fields['transform_config']}", "weights that are not transformed")
    groups = fields.get("config_groups") or {}
    kinds = {_compressed_group(group) for group in groups.values()}
    if len(kinds) != 1:
        raise _refusal(f"activations rounded in {len(kinds)} ways ({', '.join(sorted(kinds))})", "one for all config_groups")
    blocks = {_block(group["weights"].get("block_structure")) for group in groups.values()} - {None}
    if len(blocks) > 1:
        raise _refusal(f"blocks of {len(blocks)} sizes", "one for all config_groups")
    return CheckpointQuantization(kinds.pop(), next(iter(blocks), None), bool(fields.get("kv_cache_scheme")))


def _compressed_group(group: Mapping[str, Any]) -> Activations:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    _want_float8("weights", weights, ("tensor", "channel", "block"))
    if weights.get("dynamic"):
        raise _refusal("dynamic weights", "scales that the checkpoint holds")
    if group.get("output_activations"):
        raise _refusal(f"output_activations {group['output_activations']}", "null")
    if inputs is None:
        return "plain"
    _want_float8("input_activations", inputs, ("tensor", "token", "group"))
    if inputs.get("dynamic") not in (True, False):
        raise _refusal(f"input_activations with dynamic={inputs['dynamic']!r}", "true or false")
    if inputs["dynamic"]:
        return "token"
    if inputs.get("strategy") != "tensor":
        raise _refusal(f"static input_activations by {inputs.get('strategy')}", "static ones by tensor")
    return "static"


def _want_float8(name: str, scheme: Mapping[str, Any], strategies: tuple[str, ...]) -> None:
    got = {key: scheme.get(key) for key in ("num_bits", "type", "strategy", "symmetric")}
    right = got["num_bits"] == 8 and got["type"] == "float" and got["strategy"] in strategies and got["symmetric"] is not False
    if not right:
        raise _refusal(f"{name} {got}", f"symmetric floats of 8 bits by {', '.join(strategies)}")


def _fp8(fields: Mapping[str, Any]) -> CheckpointQuantization:
    _refuse_unknown(fields, _FP8_FIELDS)
    for name, wanted in _FP8_VALUES.items():
        if fields.get(name, wanted) != wanted:
            raise _refusal(f"{name}={fields[name]!r}", f"{name}={wanted!r}")
    scheme = fields.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _refusal(f"activation_scheme {scheme!r}", "dynamic and static")
    activations: Activations = "plain" if fields.get("dequantize") else "token" if scheme == "dynamic" else "static"
    block, has_kv_scales = _block(fields.get("weight_block_size")), bool(fields.get("kv_cache_scheme"))
    return CheckpointQuantization(activations, block, has_kv_scales)


def _block(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, str):  # early compressed-tensors: "128x128"
        size = [int(n) if n.isdigit() else 0 for n in size.split("x")]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise _refusal(f"blocks of {size!r}", "blocks of two positive numbers")
    return size[0], size[1]


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    unknown = {name: value for name, value in fields.items() if name not in known and value}
    if unknown:
        raise _refusal(", ".join(f"{name}={value!r}" for name, value in unknown.items()), "other fields only")


def _refusal(got: str, wanted: str) -> ModelLoadError:
    return ModelLoadError(
        f"the checkpoint is quantised with {got[:200]}, which is not supported; jaxserve can do {wanted}. "
        "Use the unquantised checkpoint (--quantization fp8 rounds it while it loads) or a GGUF file."
    )
