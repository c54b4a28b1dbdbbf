"""Gemma 3n's text model: several residual streams, inputs of each layer's own, keys and values that layers share."""

from __future__ import annotations

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same
from jaxserve.models.families.borrowing import LAYER_INPUTS, UNREAD_KV, borrowing, borrowing_tensors, kv_sources, layer_inputs
from jaxserve.models.families.from_config import activation, attention, decoder, flags, mlp, rms, windows
from jaxserve.models.families.gemma import GEMMA2
from jaxserve.models.families.llama import BIASES
from jaxserve.models.families.recurrent_tensors import Joined
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, norm_tensors
from jaxserve.models.spec import AltUpSpec, AttentionSpec, DecoderSpec, MlpSpec


def _gemma3n(config: HfConfig) -> DecoderSpec:
    config = config.get_text_config()
    seen, sources = windows(config), kv_sources(config)
    act = activation(config.hidden_activation)

    def mixer(i: int) -> AttentionSpec:
        own = attention(
            config,
            rope(config, config.rope_parameters[config.layer_types[i]]),
            window=seen[i],
            **flags(config, BIASES),
            scale=1.0,
            qk_norm=rms(config),
            v_norm=rms(config, gain=False),
        )
        return borrowing(own, sources[i])

    def block(i: int) -> MlpSpec:
        return mlp(config, config.intermediate_size[i], activation=act, sparsity=float(config.activation_sparsity_pattern[i]))

    return decoder(
        config,
        rms(config),
        mixer,
        block,
        norm_placement="sandwich",
        embed_scale=config.hidden_size**0.5,
        layer_inputs=layer_inputs(config),
        altup=AltUpSpec(
            num_streams=config.altup_num_inputs, active=config.altup_active_idx, scales_output=bool(config.altup_correct_scale)
        ),
        laurel_rank=config.laurel_rank,
        logit_softcap=config.final_logit_softcapping,
    )


def _table(spec: DecoderSpec) -> Table:
    assert spec.altup is not None
    others = range(spec.altup.num_streams - 1)
    streams: Table = {
        "streams.split": Joined(tuple(Projection(f"model.altup_projections.{i}.weight") for i in others), axis=-3),
        "streams.merge": Joined(tuple(Projection(f"model.altup_unembed_projections.{i}.weight") for i in others), axis=-3),
    }
    return borrowing_tensors(GEMMA2 | LAYER_INPUTS | _LAYER | streams, spec)


_LAYER: Table = {
    "layers.{i}.laurel.left": Projection(LAYER + "laurel.linear_left.weight"),
    "layers.{i}.laurel.right": Projection(LAYER + "laurel.linear_right.weight"),
    "layers.{i}.altup.router": Projection(LAYER + "altup.modality_router.weight"),
    "layers.{i}.altup.prediction": Projection(LAYER + "altup.prediction_coefs.weight", num_inputs=1),
    "layers.{i}.altup.correction": Projection(LAYER + "altup.correction_coefs.weight"),
    "layers.{i}.altup.output_gain": Same(LAYER + "altup.correct_output_scale"),
    **norm_tensors(
        {
            "layers.{i}.laurel.norm": LAYER + "laurel.post_laurel_norm",
            "layers.{i}.altup.router_norm": LAYER + "altup.router_norm",
        }
    ),
}
_SPARE = rf"{UNREAD_KV}|\.altup\.correct_output_scale$"

ARCHITECTURES = (
    Architecture(name="Gemma3nForCausalLM", model_type="gemma3n_text", spec=_gemma3n, tensors=_table, spare=_SPARE),
    Architecture(
        name="Gemma3nForConditionalGeneration",
        model_type="gemma3n",
        spec=_gemma3n,
        tensors=_table,
        renames={"model.language_model.": "model."},
        ignored=("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
        spare=_SPARE,
    ),
)
