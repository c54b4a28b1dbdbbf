"""What Gemma 3n and 4 share: layers that read earlier ones' keys and values, and inputs of each layer's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxserve.models.families.architecture import HfConfig
from jaxserve.models.families.assembly import Assembly, Projection, Same
from jaxserve.models.families.from_config import activation
from jaxserve.models.families.recurrent_tensors import Rows
from jaxserve.models.families.tensors import LAYER, Table, norm_tensors
from jaxserve.models.spec import AttentionSpec, BorrowingAttentionSpec, DecoderSpec, LayerInputsSpec


def kv_sources(config: HfConfig) -> Sequence[int | None]:
    """For each layer the one whose keys and values it reads; None for a layer with its own."""
    modes, kinds = config.kv_sharing_modes, config.layer_types
    stored = {kinds[i]: i for i, mode in enumerate(modes) if mode == "store"}
    return [stored[kind] if mode == "reuse" else None for mode, kind in zip(modes, kinds, strict=True)]


def borrowing(spec: AttentionSpec, source: int | None) -> AttentionSpec:
    """This attention, but with the keys and values of another layer if there is one."""
    return spec if source is None else BorrowingAttentionSpec(**vars(spec), kv_from=source)


def layer_inputs(config: HfConfig) -> LayerInputsSpec:
    """As the config says."""
    return LayerInputsSpec(
        dim=config.hidden_size_per_layer_input,
        vocab_size=config.vocab_size_per_layer_input,
        activation=activation(config.hidden_activation),
    )


def borrowing_tensors(table: Mapping[str, Assembly], spec: DecoderSpec) -> Table:
    """A table for this model: layers that read other layers' keys have a projection to q alone."""
    queries: Table = {}
    for i, layer in enumerate(spec.layers):
        if isinstance(layer.mixer, BorrowingAttentionSpec):
            name = f"model.layers.{i}.self_attn.q_proj."
            queries[f"layers.{i}.mixer.q"] = Projection(name + "weight", num_inputs=1)
            queries[f"layers.{i}.mixer.q_bias"] = Same(name + "bias", lambda shape: (math.prod(shape),))
    return {**table, **queries}


UNREAD_KV = r"\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\."  # checkpoints hold them for layers without their own, too

LAYER_INPUTS: Table = {
    "inputs.embed": Same("model.embed_tokens_per_layer.weight", lambda shape: (shape[0], math.prod(shape[1:]))),
    "inputs.project": Rows("model.per_layer_model_projection.weight", axes=2),
    "layers.{i}.input.gate": Projection(LAYER + "per_layer_input_gate.weight"),
    "layers.{i}.input.out": Projection(LAYER + "per_layer_projection.weight"),
    **norm_tensors(
        {"inputs.norm": "model.per_layer_projection_norm", "layers.{i}.input.norm": LAYER + "post_per_layer_input_norm"}
    ),
}
