"""RWKV 4: no attention at all."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same, Shape
from jaxserve.models.families.mamba import NO_LIMIT
from jaxserve.models.families.recurrent_tensors import Joined
from jaxserve.models.families.tensors import Table, norm_tensors
from jaxserve.models.recurrent_spec import ChannelMixSpec, TimeMixSpec
from jaxserve.models.spec import DecoderSpec, LayerSpec, NormSpec


def _rwkv(config: HfConfig) -> DecoderSpec:
    """rescale_every keeps float16 from overflowing and cancels out, so it needs nothing here."""
    norm = NormSpec(kind="layer", eps=config.layer_norm_epsilon, bias=True)
    layer = LayerSpec(mixer=TimeMixSpec(dim=config.attention_hidden_size), mlp=ChannelMixSpec(dim=config.intermediate_size))
    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=(layer,) * config.num_hidden_layers,
        norm=norm,
        embed_norm=norm,
        final_norm_eps=1e-5,  # the others' is in the config, this one is not
        tie_embeddings=bool(config.tie_word_embeddings),
        max_position=NO_LIMIT,
    )


def _row(shape: Shape) -> Shape:
    return (1, 1, *shape)


_BLOCK = "rwkv.blocks.{i}."
_TIME, _CHANNEL = _BLOCK + "attention.", _BLOCK + "feed_forward."
_TENSORS: Table = {
    "embed": Same("rwkv.embeddings.weight"),
    "layers.{i}.mixer.mix": Joined(tuple(Same(f"{_TIME}time_mix_{x}", _row) for x in ("key", "value", "receptance")), axis=-2),
    "layers.{i}.mixer.kvr": Joined(tuple(Projection(f"{_TIME}{x}.weight") for x in ("key", "value", "receptance")), axis=-3),
    "layers.{i}.mixer.decay": Same(_TIME + "time_decay"),
    "layers.{i}.mixer.first": Same(_TIME + "time_first"),
    "layers.{i}.mixer.out": Projection(_TIME + "output.weight"),
    "layers.{i}.mlp.mix": Joined(tuple(Same(f"{_CHANNEL}time_mix_{x}", _row) for x in ("key", "receptance")), axis=-2),
    "layers.{i}.mlp.key": Projection(_CHANNEL + "key.weight"),
    "layers.{i}.mlp.receptance": Projection(_CHANNEL + "receptance.weight"),
    "layers.{i}.mlp.value": Projection(_CHANNEL + "value.weight"),
    "lm_head": Projection("lm_head.weight"),
} | norm_tensors(
    {
        "embed_norm": "rwkv.blocks.0.pre_ln",
        "layers.{i}.mixer_norm": _BLOCK + "ln1",
        "layers.{i}.mlp_norm": _BLOCK + "ln2",
        "final_norm": "rwkv.ln_out",
    }
)

ARCHITECTURES = (
    Architecture(name="RwkvForCausalLM", model_type="rwkv", spec=_rwkv, tensors=_TENSORS, renames={"head.": "lm_head."}),
)
