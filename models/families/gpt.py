"""The GPT line: GPT-2, BigCode, Neo, J, NeoX and CodeGen; and OPT, BioGPT and XGLM, which came from fairseq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.from_config import activation, decoder, head_dim, layer_norm, mlp, refuse
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import Table, norm_tensors, tensors
from jaxserve.models.spec import AttentionSpec, DecoderSpec, PositionSpec, RopeSpec


def gpt_like(
    config: HfConfig, *, act: str, dim: int, eps: float, attention: Callable[[int], dict[str, Any]] | None = None, **changes: Any
) -> DecoderSpec:
    """A decoder with layer normalisation, plain mlp and a bias everywhere.

    Args:
        dim: F.
        attention: fields of each layer's AttentionSpec, from its number.
    """
    heads = config.num_attention_heads
    if config.hidden_size % heads:
        raise ModelLoadError(f"{heads} heads must divide the model's width of {config.hidden_size}")
    size = config.hidden_size // heads
    usual: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": size,
        "scale": size**-0.5,
        "rope": None,
        "qkv_bias": True,
        "out_bias": True,
    }
    mlp_bias, norm = changes.pop("mlp_bias", True), changes.pop("norm", layer_norm(eps))
    return decoder(
        config,
        norm,
        lambda i: AttentionSpec(**usual | (attention(i) if attention else {})),
        mlp(config, dim, activation=activation(act), gated=False, bias=mlp_bias),
        **changes,
    )


def _learned(config: HfConfig, offset: int = 0) -> PositionSpec:
    return PositionSpec(kind="learned", count=config.max_position_embeddings, offset=offset)


def _n_inner(config: HfConfig) -> int:
    return int(config.n_inner or 4 * config.hidden_size)


def _gpt2(config: HfConfig) -> DecoderSpec:
    refuse(config, add_cross_attention=False)
    scale = head_dim(config) ** -0.5 if config.scale_attn_weights else 1.0

    def attention(i: int) -> dict[str, Any]:
        return {"scale": scale / (i + 1) if config.scale_attn_by_inverse_layer_idx else scale}

    shared: dict[str, Any] = {"act": config.activation_function, "dim": _n_inner(config), "eps": config.layer_norm_epsilon}
    return gpt_like(config, **shared, attention=attention, positions=_learned(config))


def _bigcode(config: HfConfig) -> DecoderSpec:
    refuse(config, add_cross_attention=False)
    fields = {
        "scale": head_dim_of(config) ** -0.5 if config.scale_attn_weights else 1.0,
        "num_kv_heads": 1 if config.multi_query else config.num_attention_heads,
    }
    shared: dict[str, Any] = {"act": config.activation_function, "dim": _n_inner(config), "eps": config.layer_norm_epsilon}
    return gpt_like(config, **shared, attention=lambda i: fields, positions=_learned(config))


def head_dim_of(config: HfConfig) -> int:
    """Width of a head where the config has no field for it."""
    return int(config.hidden_size // config.num_attention_heads)


def _gpt_neo(config: HfConfig) -> DecoderSpec:
    kinds = config.attention_layers
    if len(kinds) != config.num_hidden_layers or set(kinds) - {"global", "local"}:
        raise ModelLoadError(f"attention_layers must name global or local for each layer; got {kinds}")

    def attention(i: int) -> dict[str, Any]:
        return {"scale": 1.0, "qkv_bias": False, "window": config.window_size if kinds[i] == "local" else None}

    dim = config.intermediate_size or 4 * config.hidden_size
    shared: dict[str, Any] = {"act": config.activation_function, "dim": dim, "eps": config.layer_norm_epsilon}
    return gpt_like(config, **shared, attention=attention, positions=_learned(config))


def _gptj(config: HfConfig) -> DecoderSpec:
    if not config.rotary_dim:
        raise ModelLoadError(f"{config.model_type} with rotary_dim={config.rotary_dim} is not supported; wanted a number")
    fields = {
        "rope": RopeSpec(theta=10_000.0, rotary_dim=config.rotary_dim, interleaved=True),
        "qkv_bias": False,
        "out_bias": False,
    }
    if config.model_type == "codegen" and config.num_attention_heads % 4:
        raise ModelLoadError(f"codegen wants num_attention_heads to be a multiple of 4; got {config.num_attention_heads}")
    shared: dict[str, Any] = {"act": config.activation_function, "dim": _n_inner(config), "eps": config.layer_norm_epsilon}
    placed: dict[str, Any] = {"norm_placement": "parallel_shared", "head_bias": True}
    return gpt_like(config, **shared, attention=lambda i: fields, **placed)


def _gpt_neox(config: HfConfig) -> DecoderSpec:
    bias = bool(config.attention_bias)
    fields = {"rope": rope(config, dim=head_dim_of(config), is_partial=True), "qkv_bias": bias, "out_bias": bias}
    shared: dict[str, Any] = {"act": config.hidden_act, "dim": config.intermediate_size, "eps": config.layer_norm_eps}
    placed: dict[str, Any] = {"norm_placement": "parallel" if config.use_parallel_residual else "pre"}
    return gpt_like(config, **shared, attention=lambda i: fields, **placed)


def _opt(config: HfConfig) -> DecoderSpec:
    bias, affine = bool(config.enable_bias), bool(config.layer_norm_elementwise_affine)
    width = config.word_embed_proj_dim
    return gpt_like(
        config,
        act=config.activation_function,
        dim=config.ffn_dim,
        eps=1e-5,
        norm=layer_norm(1e-5, gain=affine, bias=affine),
        attention=lambda i: {"qkv_bias": bias, "out_bias": bias},
        mlp_bias=bias,
        positions=_learned(config, offset=2),
        embed_dim=None if width == config.hidden_size else width,
        norm_placement="pre" if config.do_layer_norm_before else "after",
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
    )


def _embed_scale(config: HfConfig) -> float | None:
    return float(config.hidden_size**0.5) if config.scale_embedding else None


def _biogpt(config: HfConfig) -> DecoderSpec:
    shared: dict[str, Any] = {"act": config.hidden_act, "dim": config.intermediate_size, "eps": 1e-5}
    return gpt_like(config, **shared, positions=_learned(config, offset=2), embed_scale=_embed_scale(config))


def _xglm(config: HfConfig) -> DecoderSpec:
    refuse(config, add_cross_attention=False)
    if (config.pad_token_id or 0) > 1:  # that row of its sinusoids is zero
        raise ModelLoadError(f"xglm with pad_token_id={config.pad_token_id} is not supported; jaxserve can do 0 and 1")
    positions = PositionSpec(kind="sinusoidal", count=config.max_position_embeddings, offset=2)
    shared: dict[str, Any] = {"act": config.activation_function, "dim": config.ffn_dim, "eps": 1e-5}
    return gpt_like(config, **shared, positions=positions, embed_scale=_embed_scale(config))


_BLOCK: dict[str, Any] = {"layer": "transformer.h.{i}.", "embed": "transformer.wte", "final_norm": "transformer.ln_f"}
_LN: dict[str, Any] = {"mixer_norm": "ln_1", "mlp_norm": "ln_2"}
_POSITIONS: Table = {"positions": Same("transformer.wpe.weight")}
_C: dict[str, Any] = {"qkv": ("attn.c_attn",), "out": "attn.c_proj", "up": ("mlp.c_fc",), "down": "mlp.c_proj"}
_GPT2 = tensors(**_BLOCK, **_LN, **_C, layout="concatenated", is_transposed=True) | _POSITIONS
_BIGCODE = tensors(**_BLOCK, **_LN, **_C, layout="grouped") | _POSITIONS
_NEO_ATTENTION = "attn.attention."
_GPT_NEO = (
    tensors(
        **_BLOCK,
        **_LN,
        qkv=tuple(f"{_NEO_ATTENTION}{name}_proj" for name in "qkv"),
        out=f"{_NEO_ATTENTION}out_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
    )
    | _POSITIONS
)
_J: dict[str, Any] = {**_BLOCK, "mixer_norm": "ln_1", "out": "attn.out_proj", "up": ("mlp.fc_in",), "down": "mlp.fc_out"}
_GPTJ = tensors(**_J, qkv=tuple(f"attn.{name}_proj" for name in "qkv"))
_CODEGEN = tensors(**_J, qkv=("attn.qkv_proj",), layout="codegen")
_GPT_NEOX = tensors(
    layer="gpt_neox.layers.{i}.",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    lm_head="embed_out",
    qkv=("attention.query_key_value",),
    layout="grouped",
    out="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
_FAIRSEQ: dict[str, Any] = {
    "qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
    "out": "self_attn.out_proj",
    "mixer_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "up": ("fc1",),
    "down": "fc2",
}
_OPT_LAYER = "model.decoder.layers.{i}."
_OPT = (
    tensors(layer=_OPT_LAYER, embed="model.decoder.embed_tokens", final_norm="model.decoder.final_layer_norm", **_FAIRSEQ)
    | norm_tensors(
        {
            "layers.{i}.mixer_out_norm": f"{_OPT_LAYER}self_attn_layer_norm",
            "layers.{i}.mlp_out_norm": f"{_OPT_LAYER}final_layer_norm",
        }
    )
    | {
        "positions": Same("model.decoder.embed_positions.weight"),
        "embed_in": Projection("model.decoder.project_in.weight"),
        "embed_out": Projection("model.decoder.project_out.weight"),
    }
)
_BIOGPT = tensors(
    layer="biogpt.layers.{i}.",
    embed="biogpt.embed_tokens",
    final_norm="biogpt.layer_norm",
    lm_head="output_projection",
    **_FAIRSEQ,
) | {"positions": Same("biogpt.embed_positions.weight")}
_XGLM = tensors(final_norm="model.layer_norm", **_FAIRSEQ)
_MASKS = r"\.attn(\.attention)?\.(bias|masked_bias|causal_mask)$|\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"

ARCHITECTURES = (
    Architecture(name="GPT2LMHeadModel", model_type="gpt2", spec=_gpt2, tensors=_GPT2, unread=_MASKS),
    Architecture(name="GPTBigCodeForCausalLM", model_type="gpt_bigcode", spec=_bigcode, tensors=_BIGCODE, unread=_MASKS),
    Architecture(name="GPTNeoForCausalLM", model_type="gpt_neo", spec=_gpt_neo, tensors=_GPT_NEO, unread=_MASKS),
    Architecture(name="GPTJForCausalLM", model_type="gptj", spec=_gptj, tensors=_GPTJ, unread=_MASKS),
    Architecture(name="CodeGenForCausalLM", model_type="codegen", spec=_gptj, tensors=_CODEGEN, unread=_MASKS),
    Architecture(
        name="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        spec=_gpt_neox,
        tensors=_GPT_NEOX,
        renames={"lm_head.": "embed_out."},  # since transformers 5
        unread=_MASKS,
    ),
    Architecture(name="OPTForCausalLM", model_type="opt", spec=_opt, tensors=_OPT),
    Architecture(name="BioGptForCausalLM", model_type="biogpt", spec=_biogpt, tensors=_BIOGPT),
    Architecture(name="XGLMForCausalLM", model_type="xglm", spec=_xglm, tensors=_XGLM, unread=r"embed_positions\.weights$"),
)
