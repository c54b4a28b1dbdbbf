"""LongCat Flash: two latent attentions and two dense blocks a layer, experts on a shortcut around the second half."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.deepseek import latent_attention, mla_tensors
from jaxserve.models.families.from_config import decoder, mlp, refuse, rms
from jaxserve.models.families.tensors import Table, moe_tensors, tensors
from jaxserve.models.spec import DecoderSpec, MoeSpec, RouterSpec


def _longcat(config: HfConfig) -> DecoderSpec:
    """Each half of a layer is one of ours."""
    refuse(
        config, router_bias=False, norm_topk_prob=False, zero_expert_type="identity",
        qk_head_dim=config.qk_nope_head_dim + config.qk_rope_head_dim, head_dim=config.qk_rope_head_dim,
    )  # fmt: skip
    mixer = latent_attention(config, interleaved=True)
    q_multiplier, kv_multiplier = ((config.hidden_size / rank) ** 0.5 for rank in (config.q_lora_rank, config.kv_lora_rank))
    mixer = replace(mixer, scale=mixer.scale * q_multiplier, kv_multiplier=kv_multiplier)
    experts = MoeSpec(
        num_experts=config.n_routed_experts,
        num_identity=config.zero_expert_num or 0,
        top_k=config.moe_topk,
        expert=mlp(config, config.expert_ffn_hidden_size),
        router=RouterSpec(choice_bias=True, normalize=False, scale=float(config.routed_scaling_factor)),
    )
    spec = decoder(config, rms(config), lambda i: mixer, mlp(config, config.ffn_hidden_size))
    halves = (replace(layer, shortcut=None if i % 2 else experts) for i, layer in enumerate(spec.layers))
    return replace(spec, layers=tuple(halves))


def _half(i: int) -> Table:
    """The tensors of our layer i."""
    layer, nth = f"model.layers.{i // 2}.", i % 2
    experts = moe_tensors(
        layer=layer, router="mlp.router.classifier", experts="mlp.experts", choice_bias="mlp.router.e_score_correction_bias"
    )
    table = (
        tensors(
            layer=layer,
            mixer_norm=f"input_layernorm.{nth}",
            mlp_norm=f"post_attention_layernorm.{nth}",
            out=f"self_attn.{nth}.o_proj",
            up=(f"mlps.{nth}.gate_proj", f"mlps.{nth}.up_proj"),
            down=f"mlps.{nth}.down_proj",
        )
        | mla_tensors(f"{layer}self_attn.{nth}.")
        | {path.replace(".mlp.", ".shortcut."): assembly for path, assembly in experts.items()}
    )
    return {path.replace("{i}", str(i)): assembly for path, assembly in table.items()}


def _table(spec: DecoderSpec) -> Table:
    table: Table = {}
    for i in range(len(spec.layers)):
        table |= _half(i)
    return table


ARCHITECTURES = (
    Architecture(
        name="LongcatFlashForCausalLM",
        model_type="longcat_flash",
        spec=_longcat,
        tensors=_table,
        ignored=("model.mtp.",),
        spare=r"\.mlp\.experts\.\d+\.(gate|up)_proj\.",  # transformers saves them for experts that have no weights, too
    ),
)
