"""DeepSeek V2 and V3, and those with their latent attention (MLA), or their sigmoid router, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Derived, OneOf, Projection, Same
from jaxserve.models.families.from_config import decoder, flags, mlp, rms, windows
from jaxserve.models.families.llama import BIASES, LLAMA, llama_like
from jaxserve.models.families.moe import by_type, experts
from jaxserve.models.families.qkv_assembly import LatentUp
from jaxserve.models.families.rope_config import rope, yarn_mscale
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, norm_tensors
from jaxserve.models.spec import DecoderSpec, MlaSpec, MlpSpec, MoeSpec, NormSpec, RouterSpec, TemperatureSpec


def latent_attention(config: HfConfig, interleaved: bool, read_elsewhere: tuple[str, ...] = (), **changes: Any) -> MlaSpec:
    """MLA; where YaRN sharpens attention, its scale is raised as well.

    Args:
        read_elsewhere: as for `rope`.
        changes: fields of MlaSpec.
    """
    parameters = config.rope_parameters
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    if parameters.get("rope_type", "default") != "default" and parameters.get("mscale_all_dim"):
        if not parameters.get("factor"):
            raise ModelLoadError(f"rope_parameters with mscale_all_dim need a factor; got {parameters}")
        scale *= yarn_mscale(parameters["factor"], parameters["mscale_all_dim"]) ** 2
    return MlaSpec(
        num_heads=config.num_attention_heads,
        q_rank=changes.pop("q_rank", getattr(config, "q_lora_rank", None)),
        kv_rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        scale=scale,
        rope=rope(config, dim=config.qk_rope_head_dim, interleaved=interleaved, read_elsewhere=read_elsewhere),
        latent_norm=NormSpec(eps=1e-6),  # whatever rms_norm_eps is
        bias=bool(config.attention_bias),
        **changes,
    )


def _with_latents(config: HfConfig, interleaved: bool, block: Any, **fields: Any) -> DecoderSpec:
    mixer = latent_attention(config, interleaved)
    return decoder(config, rms(config), lambda i: mixer, block, **fields)


def _deepseek_v2(config: HfConfig) -> DecoderSpec:
    bias, dim = bool(config.mlp_bias), config.moe_intermediate_size
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ModelLoadError(f"topk_method {config.topk_method!r} is not supported; jaxserve can do greedy, group_limited_greedy")
    groups = {}
    if config.topk_method == "group_limited_greedy":
        groups = {"num_groups": config.n_group, "top_groups": config.topk_group}
    block = experts(
        config,
        config.n_routed_experts,
        config.num_experts_per_tok,
        RouterSpec(normalize=False, scale=float(config.routed_scaling_factor), **groups),
        dim=dim,
        shared=mlp(config, dim * config.n_shared_experts, bias=bias),
    )
    dense = mlp(config, bias=bias)
    return _with_latents(config, True, lambda i: block if i >= config.first_k_dense_replace else dense)


def sigmoid_experts(config: HfConfig, num: int, num_shared: int) -> MoeSpec:
    """DeepSeek V3's (https://arxiv.org/abs/2412.19437): sigmoid scores, and a bias that balances the choice."""
    return _grouped_experts(config, num, num_shared, RouterSpec(scores="sigmoid", choice_bias=True))


def _grouped_experts(config: HfConfig, num: int, num_shared: int, router: RouterSpec) -> MoeSpec:
    """Experts of the groups whose two best are the best; the router says how they are scored."""
    dim = config.moe_intermediate_size
    router = replace(
        router,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        group_score="best_two",
        normalize=bool(config.norm_topk_prob),
        norm_eps=1e-20,
        scale=float(config.routed_scaling_factor),
    )
    shared = mlp(config, dim * num_shared) if num_shared else None
    return experts(config, num, config.num_experts_per_tok, router, dim=dim, shared=shared)


def _deepseek_v3(config: HfConfig) -> DecoderSpec:
    block = sigmoid_experts(config, config.n_routed_experts, config.n_shared_experts)
    return _with_latents(config, bool(config.rope_interleave), _after_dense(config, block))


def _mistral4(config: HfConfig) -> DecoderSpec:
    """DeepSeek V3 with softmax scores, and q that grows with the position."""
    parameters = config.rope_parameters
    own = ("llama_4_scaling_beta", "max_position_embeddings", "partial_rotary_factor")
    beta, length = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    part = config.qk_rope_head_dim / (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if not beta or not length or abs(parameters.get("partial_rotary_factor", part) - part) > 1e-6:
        raise ModelLoadError(
            f"mistral4 with rope_parameters {parameters} is not supported; jaxserve can do those with llama_4_scaling_beta, "
            f"original_max_position_embeddings and a partial_rotary_factor of qk_rope_head_dim / qk_head_dim = {part}"
        )
    interleaved, temperature = bool(config.rope_interleave), TemperatureSpec(scale=beta, length=length)
    mixer = latent_attention(config, interleaved, read_elsewhere=own, temperature=temperature)
    block = _grouped_experts(config, config.n_routed_experts, config.n_shared_experts, RouterSpec())
    return decoder(config, rms(config), lambda i: mixer, _after_dense(config, block))


def _after_dense(config: HfConfig, block: MoeSpec) -> Callable[[int], MlpSpec | MoeSpec]:
    dense = mlp(config)
    return lambda i: block if i >= config.first_k_dense_replace else dense


def _glm4_moe_lite(config: HfConfig) -> DecoderSpec:
    block = sigmoid_experts(config, config.n_routed_experts, config.n_shared_experts)
    return _with_latents(config, bool(config.rope_interleave), by_type(config, block))


def _axk1(config: HfConfig) -> DecoderSpec:
    block = sigmoid_experts(config, config.n_routed_experts, config.n_shared_experts)
    return _with_latents(config, bool(config.rope_interleave), by_type(config, replace(block, out_norm=rms(config))))


def _youtu(config: HfConfig) -> DecoderSpec:
    return _with_latents(config, bool(config.rope_interleave), mlp(config))


def _minicpm3(config: HfConfig) -> DecoderSpec:
    return _with_latents(
        config,
        False,
        mlp(config, **flags(config, {"bias": "mlp_bias"})),
        embed_scale=float(config.scale_emb),
        residual_multiplier=float(config.scale_depth) / config.num_hidden_layers**0.5,
        logit_multiplier=config.dim_model_base / config.hidden_size,
    )


def _hy_v3(config: HfConfig) -> DecoderSpec:
    dim = config.moe_intermediate_size
    router = RouterSpec(scores="sigmoid", choice_bias=True, norm_eps=1e-20, scale=float(config.router_scaling_factor))
    bias = flags(config, {"bias": "mlp_bias"})
    shared = mlp(config, dim * config.num_shared_experts, **bias)
    block = experts(config, config.num_experts, config.num_experts_per_tok, router, dim=dim, shared=shared)
    blocks = by_type(config, block, mlp(config, **bias))
    return llama_like(config, **flags(config, BIASES), qk_norm=rms(config), mlp_spec=blocks)


def _glm4_moe(config: HfConfig) -> DecoderSpec:
    block = sigmoid_experts(config, config.n_routed_experts, config.n_shared_experts)
    return llama_like(
        config,
        ropes=[rope(config, is_partial=True)] * config.num_hidden_layers,
        qkv_bias=bool(config.attention_bias),
        qk_norm=rms(config) if config.use_qk_norm else None,
        mlp_spec=_after_dense(config, block),
    )


def _dots1(config: HfConfig) -> DecoderSpec:
    block = sigmoid_experts(config, config.n_routed_experts, config.n_shared_experts)
    seen = windows(config)
    return llama_like(config, windows=seen, **flags(config, BIASES), qk_norm=rms(config), mlp_spec=_after_dense(config, block))


def _solar_open(config: HfConfig) -> DecoderSpec:
    block = sigmoid_experts(config, config.n_routed_experts, config.n_shared_experts)
    return llama_like(
        config,
        qkv_bias=bool(config.attention_bias),
        mlp_spec=lambda i: block,
    )


def _exaone_moe(config: HfConfig) -> DecoderSpec:
    block, seen = sigmoid_experts(config, config.num_experts, config.num_shared_experts), windows(config)
    position = rope(config)
    return llama_like(
        config,
        windows=seen,
        ropes=[position if config.sliding_window is None or window is not None else None for window in seen],
        qk_norm=rms(config),
        mlp_spec=by_type(config, block),
    )


def mla_tensors(attention: str = f"{LAYER}self_attn.") -> Table:
    """The projections of latent attention; `attention` is what their names begin with."""
    return {
        "layers.{i}.mixer.q_down": Projection(f"{attention}q_a_proj.weight"),
        "layers.{i}.mixer.q_down_bias": Same(f"{attention}q_a_proj.bias"),
        "layers.{i}.mixer.q_up": OneOf(
            (
                Projection(f"{attention}q_b_proj.weight", num_inputs=1),
                Projection(f"{attention}q_proj.weight", num_inputs=1),
            )
        ),
        "layers.{i}.mixer.kv_down": Projection(f"{attention}kv_a_proj_with_mqa.weight"),
        "layers.{i}.mixer.kv_down_bias": Same(f"{attention}kv_a_proj_with_mqa.bias"),
        "layers.{i}.mixer.k_up": LatentUp(f"{attention}kv_b_proj.weight", "keys"),
        "layers.{i}.mixer.v_up": LatentUp(f"{attention}kv_b_proj.weight", "values"),
        **norm_tensors(
            {
                "layers.{i}.mixer.q_norm": f"{attention}q_a_layernorm",
                "layers.{i}.mixer.kv_norm": f"{attention}kv_a_layernorm",
            }
        ),
    }


MLA = mla_tensors()
_V3 = LLAMA | moe_tensors()
_BIAS_BESIDE = LLAMA | moe_tensors(choice_bias="mlp.e_score_correction_bias")
_HY_V3 = LLAMA | moe_tensors(router="mlp.router.gate", shared="mlp.shared_mlp", choice_bias="mlp.expert_bias")

_NO_BIAS = Derived((), lambda target: (), lambda values, target: np.zeros(target.shape, np.float32))
_AXK1 = (
    _V3
    | MLA
    | norm_tensors({"layers.{i}.mlp.out_norm": f"{LAYER}post_mlp_layernorm"})
    | {"layers.{i}.mlp.choice_bias": OneOf((Same(f"{LAYER}mlp.gate.e_score_correction_bias"), _NO_BIAS))}
)

ARCHITECTURES = (
    Architecture(
        name="AXK1ForCausalLM",
        model_type="axk1",
        spec=_axk1,
        tensors=_AXK1,
        spare=r"\.post_mlp_layernorm\.",  # dense blocks have one that is not used
    ),
    *(
        Architecture(name=name, model_type=model_type, spec=spec, tensors=table)
        for name, model_type, spec, table in (
            ("DeepseekV2ForCausalLM", "deepseek_v2", _deepseek_v2, _V3 | MLA),
            ("DeepseekV3ForCausalLM", "deepseek_v3", _deepseek_v3, _V3 | MLA),
            ("Glm4MoeLiteForCausalLM", "glm4_moe_lite", _glm4_moe_lite, _V3 | MLA),
            ("Mistral4ForCausalLM", "mistral4", _mistral4, _V3 | MLA),
            ("MiniCPM3ForCausalLM", "minicpm3", _minicpm3, LLAMA | MLA),
            ("YoutuForCausalLM", "youtu", _youtu, LLAMA | MLA),
            ("Glm4MoeForCausalLM", "glm4_moe", _glm4_moe, _V3),
            ("Dots1ForCausalLM", "dots1", _dots1, _V3),
            ("SolarOpenForCausalLM", "solar_open", _solar_open, _V3),
            ("ExaoneMoeForCausalLM", "exaone_moe", _exaone_moe, _BIAS_BESIDE),
            ("HYV3ForCausalLM", "hy_v3", _hy_v3, _HY_V3),
        )
    ),
)
