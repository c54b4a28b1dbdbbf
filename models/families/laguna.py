"""Laguna: layers with as many query heads as each wants, a softplus gate behind attention, sigmoid experts."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection
from jaxserve.models.families.from_config import attention, decoder, flags, mlp, refuse, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA
from jaxserve.models.families.moe import by_type, experts
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, moe_tensors
from jaxserve.models.spec import AttentionSpec, DecoderSpec, RouterSpec


def _laguna(config: HfConfig) -> DecoderSpec:
    refuse(config, moe_apply_router_weight_on_input=False)
    seen, heads = windows(config), config.num_attention_heads_per_layer

    def mixer(i: int) -> AttentionSpec:
        return attention(
            config,
            rope(config, config.rope_parameters[config.layer_types[i]], is_partial=True),
            num_heads=heads[i],
            window=seen[i],
            **flags(config, BIASES),
            qk_norm=rms(config),
            out_gate=True,
            gate_activation="softplus",
            gate_per_head=config.gating in (True, "per-head"),
        )

    router = RouterSpec(
        scores="sigmoid",
        choice_bias=True,
        scale=float(config.moe_routed_scaling_factor),
        logit_softcap=config.moe_router_logit_softcapping or None,
    )
    dim = config.moe_intermediate_size
    shared = mlp(config, config.shared_expert_intermediate_size)
    block = experts(config, config.num_experts, config.num_experts_per_tok, router, dim=dim, shared=shared)
    return decoder(config, rms(config), mixer, by_type(config, block))


_TABLE = (
    LLAMA
    | moe_tensors(shared="mlp.shared_expert", choice_bias="mlp.experts.e_score_correction_bias")
    | {"layers.{i}.mixer.gate": Projection(f"{LAYER}self_attn.g_proj.weight", num_inputs=1)}
)

ARCHITECTURES = (Architecture(name="LagunaForCausalLM", model_type="laguna", spec=_laguna, tensors=_TABLE),)
