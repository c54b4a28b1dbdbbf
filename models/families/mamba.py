"""Mamba 1 and 2, and FalconMamba: nothing but recurrent layers."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.from_config import activation
from jaxserve.models.families.mamba_tensors import mamba2_tensors, mamba_tensors
from jaxserve.models.families.tensors import Table
from jaxserve.models.recurrent_spec import Mamba2Spec, MambaSpec
from jaxserve.models.spec import DecoderSpec, LayerSpec, NormSpec

NO_LIMIT = 1 << 20  # tokens of context: the state does not grow, so the model itself knows no end


def _mixer(config: HfConfig) -> MambaSpec:
    return MambaSpec(
        dim=config.intermediate_size,
        state_dim=config.state_size,
        dt_rank=int(config.time_step_rank),
        conv_kernel=config.conv_kernel,
        activation=activation(config.hidden_act),
        conv_bias=bool(config.use_conv_bias),
        proj_bias=bool(config.use_bias),
    )


def _mamba(config: HfConfig) -> DecoderSpec:
    return _decoder(config, _mixer(config))


def _falcon_mamba(config: HfConfig) -> DecoderSpec:
    return _decoder(config, replace(_mixer(config), inner_norm=NormSpec(eps=config.mixer_rms_eps, gain=False)))


def _mamba2(config: HfConfig) -> DecoderSpec:
    low, high = config.time_step_limit
    mixer = Mamba2Spec(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        state_dim=config.state_size,
        num_groups=config.n_groups,
        conv_kernel=config.conv_kernel,
        activation=activation(config.hidden_act),
        conv_bias=bool(config.use_conv_bias),
        in_bias=bool(config.use_bias),
        out_bias=bool(config.use_bias),
        dt_min=float(low),
        dt_max=float(high),
        norm_eps=config.layer_norm_epsilon,
    )
    return _decoder(config, mixer)


def _decoder(config: HfConfig, mixer: MambaSpec | Mamba2Spec) -> DecoderSpec:
    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=(LayerSpec(mixer=mixer, mlp=None),) * config.num_hidden_layers,
        norm=NormSpec(eps=config.layer_norm_epsilon),
        tie_embeddings=bool(config.tie_word_embeddings),
        max_position=NO_LIMIT,
    )


_LAYER = "backbone.layers.{i}."
_OUTSIDE: Table = {
    "embed": Same("backbone.embeddings.weight"),
    "layers.{i}.mixer_norm.weight": Same(_LAYER + "norm.weight"),
    "final_norm.weight": Same("backbone.norm_f.weight"),
    "lm_head": Projection("lm_head.weight"),
}
_MAMBA, _MAMBA2 = _OUTSIDE | mamba_tensors(_LAYER + "mixer."), _OUTSIDE | mamba2_tensors(_LAYER + "mixer.")

ARCHITECTURES = tuple(
    Architecture(
        name=name,
        model_type=model_type,
        spec=spec,
        tensors=table,
        renames={"backbone.embedding.": "backbone.embeddings."},  # as the first checkpoints have it
    )
    for name, model_type, spec, table in (
        ("MambaForCausalLM", "mamba", _mamba, _MAMBA),
        ("FalconMambaForCausalLM", "falcon_mamba", _falcon_mamba, _MAMBA),
        ("Mamba2ForCausalLM", "mamba2", _mamba2, _MAMBA2),
    )
)
