"""MiMo V2: windows with sinks in most layers, values narrower than keys, DeepSeek V3's router without a shared expert."""

from __future__ import annotations

import math

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.deepseek import sigmoid_experts
from jaxserve.models.families.from_config import attention, decoder, refuse, rms, windows
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.families.moe import by_type
from jaxserve.models.families.qkv_assembly import KvHeads
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors
from jaxserve.models.spec import AttentionSpec, DecoderSpec, NarrowValueAttentionSpec


def _mimo_v2(config: HfConfig) -> DecoderSpec:
    _check_older_fields(config)
    seen = windows(config)
    multiplier = 1.0 if config.attention_value_scale is None else float(config.attention_value_scale)

    def mixer(i: int) -> AttentionSpec:
        parameters = {"partial_rotary_factor": 0.334} | dict(config.rope_parameters[config.layer_types[i]])
        has_window = seen[i] is not None
        spec = attention(
            config,
            rope(config, parameters, is_partial=True),
            num_kv_heads=config.num_key_value_heads * (2 if has_window else 1),
            window=seen[i],
            sinks=has_window,
            qkv_bias=bool(config.attention_bias),
            value_multiplier=multiplier,
        )
        if config.v_head_dim == spec.head_dim:
            return spec
        return NarrowValueAttentionSpec(**vars(spec), narrow_dim=config.v_head_dim)

    block = sigmoid_experts(config, config.n_routed_experts, 0)
    return decoder(config, rms(config), mixer, by_type(config, block))


def _check_older_fields(config: HfConfig) -> None:
    """Fields of the published configs, which transformers does not read: they must say what it takes for granted."""
    types = config.layer_types
    refuse(
        config,
        hybrid_layer_pattern=[int(kind == "sliding_attention") for kind in types],
        moe_layer_freq=[int(kind == "sparse") for kind in config.mlp_layer_types],
        swa_num_attention_heads=config.num_attention_heads,
        swa_num_key_value_heads=2 * config.num_key_value_heads,
        swa_head_dim=config.head_dim,
        swa_v_head_dim=config.v_head_dim,
        rope_theta=config.rope_parameters.get("full_attention", {}).get("rope_theta"),
        swa_rope_theta=config.rope_parameters.get("sliding_attention", {}).get("rope_theta"),
        add_full_attention_sink_bias=False,
        add_swa_attention_sink_bias=True,
        n_shared_experts=0,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    )


_ATTENTION = f"{LAYER}self_attn."
_MIMO: Table = (
    LLAMA
    | moe_tensors()
    | {
        "layers.{i}.mixer.sinks": Same(f"{_ATTENTION}attention_sink_bias"),
        "layers.{i}.mixer.q": Projection(f"{_ATTENTION}q_proj.weight", num_inputs=1),
        "layers.{i}.mixer.k": KvHeads(f"{_ATTENTION}k_proj.weight"),
        "layers.{i}.mixer.v": KvHeads(f"{_ATTENTION}v_proj.weight"),
        "layers.{i}.mixer.q_bias": Same(f"{_ATTENTION}q_proj.bias", lambda shape: (math.prod(shape),)),
        "layers.{i}.mixer.k_bias": KvHeads(f"{_ATTENTION}k_proj.bias"),
        "layers.{i}.mixer.v_bias": KvHeads(f"{_ATTENTION}v_proj.bias"),
    }
)

ARCHITECTURES = (
    Architecture(
        name="MiMoV2FlashForCausalLM",
        model_type="mimo_v2_flash",
        spec=_mimo_v2,
        tensors=_MIMO,
        ignored=("model.mtp.",),
    ),
)
