"""gpt-oss (sinks, clamped SwiGLU), Granite with sinks, and Llama 4 (chunked attention): experts fused in the checkpoint."""

from __future__ import annotations

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Same
from jaxserve.models.families.from_config import attention, decoder, flags, layer_types, mlp, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA, granite_multipliers, llama_like
from jaxserve.models.families.moe import GRANITE_MOE_SWA, granite_experts
from jaxserve.models.families.moe_assembly import FusedDown, FusedUp
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, tensors
from jaxserve.models.spec import (
    AttentionSpec,
    ClampedSwiglu,
    DecoderSpec,
    MlpSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
    TemperatureSpec,
)


def _gpt_oss(config: HfConfig) -> DecoderSpec:
    clamped = ClampedSwiglu(alpha=float(getattr(config, "swiglu_alpha", 1.702)), limit=float(config.swiglu_limit))
    block = MoeSpec(
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        expert=MlpSpec(dim=config.intermediate_size, activation="silu", bias=True, clamped=clamped),
        router=RouterSpec(bias=True),
    )
    return llama_like(config, windows=windows(config), **flags(config, BIASES), sinks=True, mlp_spec=lambda i: block)


def _llama4(config: HfConfig) -> DecoderSpec:
    kinds, has_rope = layer_types(config, "full_attention", "chunked_attention"), config.no_rope_layers
    if len(has_rope) != config.num_hidden_layers:
        raise ModelLoadError(f"no_rope_layers names {len(has_rope)} layers; num_hidden_layers is {config.num_hidden_layers}")
    if "chunked_attention" in kinds and not config.attention_chunk_size:
        raise ModelLoadError(f"layer_types has chunked_attention, but attention_chunk_size is {config.attention_chunk_size!r}")
    position, unit = rope(config, interleaved=True), NormSpec(eps=config.rms_norm_eps, gain=False)
    temperature = TemperatureSpec(scale=config.attn_scale, length=config.floor_scale, offset=1.0)

    def mixer(i: int) -> AttentionSpec:
        return attention(
            config,
            position if has_rope[i] else None,
            **flags(config, BIASES),
            chunk=config.attention_chunk_size if kinds[i] == "chunked_attention" else None,
            qk_norm=unit if config.use_qk_norm and has_rope[i] else None,
            qk_norm_after_rope=True,
            temperature=temperature if config.attn_temperature_tuning and not has_rope[i] else None,
        )

    block = MoeSpec(
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        expert=mlp(config),
        router=RouterSpec(scores="sigmoid", normalize=False),
        shared=mlp(config),
        weight_on_input=True,
    )
    dense = mlp(config, config.intermediate_size_mlp)
    sparse = config.moe_layers
    return decoder(config, rms(config), mixer, lambda i: block if i in sparse else dense)


def _granite_swa(config: HfConfig) -> DecoderSpec:
    """Granite with windows, sinks (as a share of what is attended to, which is the same), and a rope or none in each layer."""
    thetas, block = config.layer_rope_theta, granite_experts(config) if config.model_type == "granitemoe_swa" else None
    if len(thetas) != config.num_hidden_layers:
        raise ModelLoadError(f"layer_rope_theta names {len(thetas)} layers; num_hidden_layers is {config.num_hidden_layers}")
    return llama_like(
        config,
        windows=windows(config),
        ropes=[rope(config, config.rope_parameters | {"rope_theta": theta}) if theta else None for theta in thetas],
        **flags(config, BIASES),
        scale=float(config.attention_multiplier),
        sinks=True,
        mlp_fields=flags(config, {"bias": "mlp_bias"}),
        mlp_spec=None if block is None else lambda i: block,
        decoder_fields=granite_multipliers(config),
    )


_SINKS: Table = {"layers.{i}.mixer.sinks": Same(f"{LAYER}self_attn.sinks")}
_OSS_EXPERTS = f"{LAYER}mlp.experts."
_GPT_OSS = LLAMA | {
    **moe_tensors(router="mlp.router"),
    "layers.{i}.mlp.experts_up": FusedUp(f"{_OSS_EXPERTS}gate_up_proj", "interleaved"),
    "layers.{i}.mlp.experts_up_bias": FusedUp(f"{_OSS_EXPERTS}gate_up_proj_bias", "interleaved"),
    "layers.{i}.mlp.experts_down": FusedDown(f"{_OSS_EXPERTS}down_proj", is_linear=False),
    "layers.{i}.mlp.experts_down_bias": Same(f"{_OSS_EXPERTS}down_proj_bias"),
    **_SINKS,
}
_EXPERTS4 = f"{LAYER}feed_forward.experts."
_LLAMA4 = tensors(up=("feed_forward.gate_proj", "feed_forward.up_proj"), down="feed_forward.down_proj") | {
    **moe_tensors(router="feed_forward.router", shared="feed_forward.shared_expert"),
    "layers.{i}.mlp.experts_up": FusedUp(f"{_EXPERTS4}gate_up_proj", "halves"),
    "layers.{i}.mlp.experts_down": FusedDown(f"{_EXPERTS4}down_proj", is_linear=False),
}


ARCHITECTURES = (
    Architecture(name="GptOssForCausalLM", model_type="gpt_oss", spec=_gpt_oss, tensors=_GPT_OSS),
    Architecture(name="GraniteSWAForCausalLM", model_type="granite_swa", spec=_granite_swa, tensors=LLAMA | _SINKS),
    Architecture(
        name="GraniteMoeSWAForCausalLM", model_type="granitemoe_swa", spec=_granite_swa, tensors=GRANITE_MOE_SWA | _SINKS
    ),
    Architecture(name="Llama4ForCausalLM", model_type="llama4_text", spec=_llama4, tensors=_LLAMA4),
)
