"""Mamba: nothing but recurrent layers."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Assembly, Projection, Same
from jaxserve.models.families.from_config import activation
from jaxserve.models.families.recurrent_tensors import ConvRows, Rows
from jaxserve.models.spec import DecoderSpec, LayerSpec, MambaSpec, NormSpec

NO_LIMIT = 1 << 20  # tokens of context: the state does not grow, so the model itself knows no end


def _mamba(config: HfConfig) -> DecoderSpec:
    mixer = MambaSpec(
        dim=config.intermediate_size,
        state_dim=config.state_size,
        dt_rank=int(config.time_step_rank),
        conv_kernel=config.conv_kernel,
        activation=activation(config.hidden_act),
        conv_bias=bool(config.use_conv_bias),
        proj_bias=bool(config.use_bias),
    )
    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=(LayerSpec(mixer=mixer, mlp=None),) * config.num_hidden_layers,
        norm=NormSpec(eps=config.layer_norm_epsilon),
        tie_embeddings=bool(config.tie_word_embeddings),
        max_position=NO_LIMIT,
    )


def mamba_tensors(prefix: str) -> dict[str, Assembly]:
    """The tensors of a Mamba mixer whose names begin with `prefix`."""
    return {
        "layers.{i}.mixer.into": Rows(prefix + "in_proj.weight", axes=2),
        "layers.{i}.mixer.into_bias": Rows(prefix + "in_proj.bias", axes=2),
        "layers.{i}.mixer.conv": ConvRows(prefix + "conv1d.weight"),
        "layers.{i}.mixer.conv_bias": Same(prefix + "conv1d.bias"),
        "layers.{i}.mixer.select": Projection(prefix + "x_proj.weight"),
        "layers.{i}.mixer.dt_proj": Projection(prefix + "dt_proj.weight"),
        "layers.{i}.mixer.dt_bias": Same(prefix + "dt_proj.bias"),
        "layers.{i}.mixer.a_log": Same(prefix + "A_log"),
        "layers.{i}.mixer.skip": Same(prefix + "D"),
        "layers.{i}.mixer.out": Projection(prefix + "out_proj.weight"),
        "layers.{i}.mixer.out_bias": Same(prefix + "out_proj.bias"),
    }


_LAYER = "backbone.layers.{i}."
BACKBONE_TENSORS: dict[str, Assembly] = {
    "embed": Same("backbone.embeddings.weight"),
    "layers.{i}.mixer_norm.weight": Same(_LAYER + "norm.weight"),
    "final_norm.weight": Same("backbone.norm_f.weight"),
    "lm_head": Projection("lm_head.weight"),
}

ARCHITECTURES = (
    Architecture(
        name="MambaForCausalLM",
        model_type="mamba",
        spec=_mamba,
        tensors=BACKBONE_TENSORS | mamba_tensors(_LAYER + "mixer."),
        renames={"backbone.embedding.": "backbone.embeddings."},  # as the first checkpoints have it
    ),
)
