"""Families that put Mamba layers beside attention: Jamba, Bamba, Falcon-H1, Granite hybrid, Nemotron-H."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Halves, OneOf, Projection, Same, Stack
from jaxserve.models.families.from_config import activation, attention, decoder, flags, mlp, refuse, rms
from jaxserve.models.families.llama import BIASES, granite_multipliers
from jaxserve.models.families.mamba_tensors import mamba2_tensors, mamba_tensors
from jaxserve.models.families.moe import experts
from jaxserve.models.families.moe_assembly import ExpertUp, FusedDown, FusedUp
from jaxserve.models.families.qkv_assembly import Qkv
from jaxserve.models.families.recurrent_tensors import either
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, tensors
from jaxserve.models.recurrent_spec import Mamba2Spec, MambaSpec
from jaxserve.models.spec import Branch, DecoderSpec, LayerSpec, MixerSpec, MlpSpec, MoeSpec, NormSpec, ParallelSpec, RouterSpec


def _mamba2(config: HfConfig) -> Mamba2Spec:
    """A Mamba 2 mixer as Bamba's config, and those that follow it, describe it."""
    low, high = config.time_step_limit or (0.0, float("inf"))
    return Mamba2Spec(
        num_heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        state_dim=config.mamba_d_state,
        num_groups=config.mamba_n_groups,
        conv_kernel=config.mamba_d_conv,
        activation=activation(config.hidden_act),
        conv_bias=bool(config.mamba_conv_bias),
        in_bias=bool(config.mamba_proj_bias),
        out_bias=bool(config.mamba_proj_bias),
        dt_min=float(low),
        dt_max=float(high),
        norm_eps=config.rms_norm_eps,
    )


def _jamba(config: HfConfig) -> DecoderSpec:
    mamba = MambaSpec(
        dim=config.mamba_expand * config.hidden_size,
        state_dim=config.mamba_d_state,
        dt_rank=config.mamba_dt_rank,
        conv_kernel=config.mamba_d_conv,
        activation=activation(config.hidden_act),
        conv_bias=bool(config.mamba_conv_bias),
        proj_bias=bool(config.mamba_proj_bias),
        inner_norm=rms(config),
    )
    mixers: dict[str, MixerSpec] = {"full_attention": attention(config, None), "linear_attention": mamba}
    blocks: dict[bool, MlpSpec | MoeSpec] = {False: mlp(config)}
    sparse = [count > 1 for count in config.layers_num_experts]
    if any(sparse):
        blocks[True] = experts(config, config.num_experts, config.num_experts_per_tok, RouterSpec(normalize=False))
    return decoder(config, rms(config), lambda i: mixers[config.layer_types[i]], lambda i: blocks[sparse[i]])


def _bamba(config: HfConfig) -> DecoderSpec:
    mixers: dict[str, MixerSpec] = {
        "full_attention": attention(config, rope(config, is_partial=True), **flags(config, BIASES)),
        "linear_attention": _mamba2(config),
    }
    block = mlp(config, bias=bool(config.mlp_bias))
    return decoder(config, rms(config), lambda i: mixers[config.layers_block_type[i]], block)


def _falcon_h1(config: HfConfig) -> DecoderSpec:
    heads = attention(config, rope(config), **flags(config, BIASES))
    heads = replace(heads, scale=heads.scale * config.key_multiplier)
    z, x, b, c, dt = map(float, config.ssm_multipliers)
    mamba = replace(
        _mamba2(config),
        out_bias=bool(config.projectors_bias),
        norm=("before" if config.mamba_norm_before_gate else "after") if config.mamba_rms_norm else None,
        multipliers=(z, x, b, c, dt),
    )
    mixer = ParallelSpec(
        branches=(
            Branch(mixer=mamba, in_multiplier=config.ssm_in_multiplier, out_multiplier=config.ssm_out_multiplier),
            Branch(mixer=heads, in_multiplier=config.attention_in_multiplier, out_multiplier=config.attention_out_multiplier),
        )
    )
    gate, down = map(float, config.mlp_multipliers)
    return decoder(
        config,
        rms(config),
        lambda i: mixer,
        mlp(config, bias=bool(config.mlp_bias), gate_multiplier=gate, out_multiplier=down),
        embed_scale=config.embedding_multiplier,
        logit_multiplier=config.lm_head_multiplier,
    )


def _granite_hybrid(config: HfConfig) -> DecoderSpec:
    kind = config.position_embedding_type
    if kind not in ("rope", "nope", None):
        raise ModelLoadError(f"position_embedding_type {kind!r} is not supported; jaxserve can do rope, nope")
    mixers: dict[str, MixerSpec] = {
        "full_attention": attention(
            config, rope(config) if kind == "rope" else None, scale=config.attention_multiplier, **flags(config, BIASES)
        ),
        "linear_attention": _mamba2(config),
    }
    if unknown := set(config.layers_block_type) - set(mixers):
        raise ModelLoadError(f"layer types {sorted(unknown)} are not supported; jaxserve can do {', '.join(mixers)}")
    shared = mlp(config, config.shared_intermediate_size)
    block: MlpSpec | MoeSpec = shared
    if config.num_local_experts:
        block = experts(config, config.num_local_experts, config.num_experts_per_tok, RouterSpec(), shared=shared)
    return decoder(config, rms(config), lambda i: mixers[config.layers_block_type[i]], block, **granite_multipliers(config))


def _nemotron_h(config: HfConfig) -> DecoderSpec:
    mamba = Mamba2Spec(
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        state_dim=config.ssm_state_size,
        num_groups=config.n_groups,
        conv_kernel=config.conv_kernel,
        activation=activation(config.mamba_hidden_act),
        conv_bias=bool(config.use_conv_bias),
        in_bias=bool(config.use_bias),
        out_bias=bool(config.use_bias),
        dt_min=float(config.time_step_min),
        norm_eps=config.layer_norm_epsilon,
    )
    kinds = {
        "linear_attention": LayerSpec(mixer=mamba, mlp=None),
        "full_attention": LayerSpec(mixer=attention(config, None), mlp=None),
        "mlp": LayerSpec(mixer=None, mlp=_plain(config, config.intermediate_size)),
    }
    if "moe" in config.layers_block_type:
        kinds["moe"] = LayerSpec(mixer=None, mlp=_nemotron_experts(config))
    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=tuple(kinds[kind] for kind in config.layers_block_type),
        norm=NormSpec(eps=config.layer_norm_epsilon),
        max_position=config.max_position_embeddings,
    )


def _plain(config: HfConfig, dim: int, *, bias: bool | None = None) -> MlpSpec:
    act = activation(config.mlp_hidden_act)
    return MlpSpec(dim=dim, activation=act, gated=False, bias=bool(config.mlp_bias) if bias is None else bias)


def _nemotron_experts(config: HfConfig) -> MoeSpec:
    refuse(config, moe_latent_size=None)
    router = RouterSpec(
        scores="sigmoid",
        choice_bias=True,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        group_score="best_two",
        normalize=bool(config.norm_topk_prob),
        norm_eps=1e-20,
        scale=config.routed_scaling_factor,
    )
    return MoeSpec(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        expert=_plain(config, config.moe_intermediate_size, bias=False),
        router=router,
        shared=_plain(config, config.moe_shared_expert_intermediate_size),
    )


def attention_tensors(prefix: str, path: str = "layers.{i}.mixer.") -> Table:
    """Attention whose tensors' names begin with `prefix`, under our `path`."""
    table: Table = {path + "out": Projection(prefix + "o_proj.weight"), path + "out_bias": Same(prefix + "o_proj.bias")}
    for ours, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
        table[path + ours] = Qkv(tuple(f"{prefix}{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")))
    return table


_MIXER = "model.layers.{i}.mixer."
_LLAMA_LIKE = tensors(
    final_norm="model.final_layernorm",
    mlp_norm="pre_ff_layernorm",
    up=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
)

ARCHITECTURES = (
    Architecture(
        name="JambaForCausalLM",
        model_type="jamba",
        spec=_jamba,
        tensors=either(_LLAMA_LIKE, mamba_tensors(LAYER + "mamba."))
        | moe_tensors(router="feed_forward.router", experts="feed_forward.experts"),
    ),
    Architecture(
        name="BambaForCausalLM",
        model_type="bamba",
        spec=_bamba,
        tensors=either(_LLAMA_LIKE, mamba2_tensors(LAYER + "mamba.")),
    ),
    Architecture(
        name="FalconH1ForCausalLM",
        model_type="falcon_h1",
        spec=_falcon_h1,
        tensors=_LLAMA_LIKE
        | mamba2_tensors(LAYER + "mamba.", "layers.{i}.mixer.branches.0.")
        | attention_tensors(LAYER + "self_attn.", "layers.{i}.mixer.branches.1."),
    ),
    Architecture(
        name="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        spec=_granite_hybrid,
        tensors=either(
            tensors(gate_up="shared_mlp.input_linear", down="shared_mlp.output_linear"), mamba2_tensors(LAYER + "mamba.")
        )
        | {
            "layers.{i}.mlp.router": Projection(LAYER + "block_sparse_moe.router.layer.weight"),
            "layers.{i}.mlp.experts_up": FusedUp(LAYER + "block_sparse_moe.input_linear.weight"),
            "layers.{i}.mlp.experts_down": FusedDown(LAYER + "block_sparse_moe.output_linear.weight"),
            "layers.{i}.mlp.shared.up": Halves(LAYER + "shared_mlp.input_linear.weight"),
            "layers.{i}.mlp.shared.down": Projection(LAYER + "shared_mlp.output_linear.weight"),
        },
    ),
    Architecture(
        name="NemotronHForCausalLM",
        model_type="nemotron_h",
        spec=_nemotron_h,
        tensors=either(attention_tensors(_MIXER), mamba2_tensors(_MIXER))
        | moe_tensors(layer=_MIXER, router="gate", experts="experts", shared="shared_experts")
        | {
            "embed": Same("model.embeddings.weight"),
            "layers.{i}.mixer_norm.weight": Same(LAYER + "norm.weight"),
            "layers.{i}.mlp_norm.weight": Same(LAYER + "norm.weight"),
            "layers.{i}.mlp.up": Stack((_MIXER + "up_proj.weight",)),
            "layers.{i}.mlp.up_bias": Stack((_MIXER + "up_proj.bias",)),
            "layers.{i}.mlp.down": Projection(_MIXER + "down_proj.weight"),
            "layers.{i}.mlp.down_bias": Same(_MIXER + "down_proj.bias"),
            "layers.{i}.mlp.experts_up": OneOf(
                (ExpertUp((_MIXER + "experts.{e}.up_proj.weight",)), FusedUp(_MIXER + "experts.up_proj"))
            ),
            "layers.{i}.mlp.shared.up": Stack((_MIXER + "shared_experts.up_proj.weight",)),
            "layers.{i}.mlp.shared.up_bias": Stack((_MIXER + "shared_experts.up_proj.bias",)),
            "final_norm.weight": Same("model.norm_f.weight"),
            "lm_head": Projection("lm_head.weight"),
        },
        renames={"backbone.": "model."},
        unread=r"^mtp\.",
    ),
)
