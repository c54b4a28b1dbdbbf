"""The tensor names that Llama set and most later families share."""

from __future__ import annotations

from jaxserve.models.families.assembly import Assembly, FusedQkv, Projection, Same, Stack

_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."


def _qkv(kind: str) -> FusedQkv:
    return FusedQkv((f"{_ATTENTION}q_proj.{kind}", f"{_ATTENTION}k_proj.{kind}", f"{_ATTENTION}v_proj.{kind}"))


def _gate_up(kind: str) -> Stack:
    return Stack((f"{_MLP}gate_proj.{kind}", f"{_MLP}up_proj.{kind}"))


LLAMA_TENSORS: dict[str, Assembly] = {
    "embed": Same("model.embed_tokens.weight"),
    "layers.{i}.mixer_norm.weight": Same(_LAYER + "input_layernorm.weight"),
    "layers.{i}.mixer.qkv": _qkv("weight"),
    "layers.{i}.mixer.qkv_bias": _qkv("bias"),
    "layers.{i}.mixer.q_norm.weight": Same(_ATTENTION + "q_norm.weight"),
    "layers.{i}.mixer.k_norm.weight": Same(_ATTENTION + "k_norm.weight"),
    "layers.{i}.mixer.out": Projection(_ATTENTION + "o_proj.weight"),
    "layers.{i}.mixer.out_bias": Same(_ATTENTION + "o_proj.bias"),
    "layers.{i}.mlp_norm.weight": Same(_LAYER + "post_attention_layernorm.weight"),
    "layers.{i}.mlp.up": _gate_up("weight"),
    "layers.{i}.mlp.up_bias": _gate_up("bias"),
    "layers.{i}.mlp.down": Projection(_MLP + "down_proj.weight"),
    "layers.{i}.mlp.down_bias": Same(_MLP + "down_proj.bias"),
    "final_norm.weight": Same("model.norm.weight"),
    "lm_head": Projection("lm_head.weight"),
}

GEMMA_TENSORS: dict[str, Assembly] = LLAMA_TENSORS | {
    "layers.{i}.mixer_out_norm.weight": Same(_LAYER + "post_attention_layernorm.weight"),
    "layers.{i}.mlp_norm.weight": Same(_LAYER + "pre_feedforward_layernorm.weight"),
    "layers.{i}.mlp_out_norm.weight": Same(_LAYER + "post_feedforward_layernorm.weight"),
}
