"""Llamas with an attention of their own: differential (DiffLlama), and raised by values (Doge)."""

from __future__ import annotations

import math

import numpy as np

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Derived, Projection, Same
from jaxserve.models.families.from_config import decoder, flags, head_dim, kv_heads, mlp, refuse, rms
from jaxserve.models.families.llama import BIASES, LLAMA
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER
from jaxserve.models.spec import DecoderSpec, DifferentialAttentionSpec, ValueLogitAttentionSpec


def _diffllama(config: HfConfig) -> DecoderSpec:
    dim, position = head_dim(config), rope(config)

    def mixer(i: int) -> DifferentialAttentionSpec:
        return DifferentialAttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=kv_heads(config),
            head_dim=dim,
            scale=dim**-0.5,
            rope=position,
            start=0.8 - 0.6 * math.exp(-0.3 * i),
            eps=config.rms_norm_eps,
            **flags(config, BIASES),
        )

    return decoder(config, rms(config), mixer, mlp(config))


def _doge(config: HfConfig) -> DecoderSpec:
    refuse(config, is_moe=False)
    dim, position, norm = head_dim(config), rope(config), rms(config)
    mixer = ValueLogitAttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=position,
        window=config.sliding_window,
        qk_norm=norm,
        **flags(config, BIASES),
    )
    # Past keep_window_size keys it would read only those that score best.
    longest = min(config.max_position_embeddings, config.keep_window_size)
    block = mlp(config, **flags(config, {"bias": "mlp_bias"}))
    return decoder(config, norm, lambda i: mixer, block, residual_gain=True, max_position=longest)


_ATTENTION = f"{LAYER}self_attn."
_DIFFLLAMA = LLAMA | {
    "layers.{i}.mixer.lambdas": Derived(
        tuple(f"{_ATTENTION}lambda_{name}" for name in ("q1", "k1", "q2", "k2")),
        lambda target: (target.shape[1:],) * 4,
        lambda values, target: np.stack(values),
    )
}
_DOGE = LLAMA | {
    "layers.{i}.mixer.value_logits": Projection(f"{_ATTENTION}dt_proj.weight"),
    "layers.{i}.mixer.value_logits_bias": Same(f"{_ATTENTION}dt_proj.bias"),
    "layers.{i}.mixer.value_logits_scale": Same(f"{_ATTENTION}A"),
    "layers.{i}.mixer_gain": Same(f"{LAYER}input_residual"),
    "layers.{i}.mlp_gain": Same(f"{LAYER}post_attention_residual"),
}

ARCHITECTURES = (
    Architecture(name="DiffLlamaForCausalLM", model_type="diffllama", spec=_diffllama, tensors=_DIFFLLAMA),
    Architecture(name="DogeForCausalLM", model_type="doge", spec=_doge, tensors=_DOGE),
)
