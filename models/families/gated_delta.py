"""Qwen3-Next and Qwen3.5: gated delta nets, and attention with a gate in some layers."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Assembly, Projection, Same, Target
from jaxserve.models.families.from_config import activation, attention, decoder, layer_types, mlp, rms
from jaxserve.models.families.moe import experts
from jaxserve.models.families.recurrent_tensors import ConvRows, GatedQkv, HeadRows, Joined, Rows, either, mixer_of
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, moe_tensors, tensors
from jaxserve.models.recurrent_spec import GatedDeltaSpec
from jaxserve.models.spec import DecoderSpec, MixerSpec, MlpSpec, MoeSpec, RouterSpec


def gated_delta(config: HfConfig) -> GatedDeltaSpec:
    return GatedDeltaSpec(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        conv_kernel=config.linear_conv_kernel_dim,
        activation=activation(config.hidden_act),
        norm_eps=config.rms_norm_eps,
    )


def _spec(config: HfConfig, blocks: Sequence[MlpSpec | MoeSpec]) -> DecoderSpec:
    """blocks: of each layer."""
    norm, bias = rms(config, unit_offset=True), bool(config.attention_bias)
    mixers: dict[str, MixerSpec] = {
        # Text alone has the same position on all of mrope's axes, so that it is plain rope.
        "full_attention": attention(
            config,
            rope(config, is_partial=True, read_elsewhere=("mrope_section", "mrope_interleaved")),
            qk_norm=norm,
            qkv_bias=bias,
            out_bias=bias,
            out_gate=True,
            gate_bias=bias,
        ),
        "linear_attention": gated_delta(config),
    }
    kinds = layer_types(config, *mixers)
    return decoder(config, norm, lambda i: mixers[kinds[i]], lambda i: blocks[i])


def _experts(config: HfConfig, *, normalize: bool) -> MoeSpec:
    return experts(
        config,
        config.num_experts,
        config.num_experts_per_tok,
        RouterSpec(normalize=normalize),
        dim=config.moe_intermediate_size,
        shared=mlp(config, config.shared_expert_intermediate_size),
        shared_gate=True,
    )


def _qwen3_next(config: HfConfig) -> DecoderSpec:
    layers = range(config.num_hidden_layers)
    sparse = [
        i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0 for i in layers
    ]
    block = _experts(config, normalize=bool(config.norm_topk_prob)) if any(sparse) else None
    return _spec(config, [block if block and sparse[i] else mlp(config) for i in layers])


def _qwen3_5(config: HfConfig) -> DecoderSpec:
    config = config.get_text_config()
    return _spec(config, [mlp(config)] * config.num_hidden_layers)


def _qwen3_5_moe(config: HfConfig) -> DecoderSpec:
    config = config.get_text_config()
    return _spec(config, [_experts(config, normalize=True)] * config.num_hidden_layers)


def _delta(target: Target) -> GatedDeltaSpec:
    return mixer_of(target, GatedDeltaSpec)


def _key_dim(target: Target) -> int:
    """Rows of all keys, and of all queries."""
    return _delta(target).num_key_heads * _delta(target).key_dim


def qkv_sizes(target: Target) -> tuple[int, int, int]:
    """Rows of all queries, keys and values."""
    return _key_dim(target), _key_dim(target), _value_dim(target)


def qk_rows(target: Target) -> tuple[int, int]:
    return 0, 2 * _key_dim(target) + _value_dim(target)


def v_rows(target: Target) -> tuple[int, int]:
    return 2 * _key_dim(target), 2 * _key_dim(target) + _value_dim(target)


def _value_dim(target: Target) -> int:
    return _delta(target).num_value_heads * _delta(target).value_dim


def _of_head(part: int) -> HeadRows:
    """q, k, v or z (parts 0 to 3) of in_proj_qkvz, where each key head's rows lie together."""

    def rows(target: Target) -> tuple[int, int]:
        spec = _delta(target)
        values = spec.num_value_heads // spec.num_key_heads * spec.value_dim
        sizes = (spec.key_dim, spec.key_dim, values, values)
        return sum(sizes[:part]), sum(sizes)

    return HeadRows(LAYER + "linear_attn.in_proj_qkvz.weight", axes=1 if part < 2 else 2, part=rows)


def _ba(part: int) -> HeadRows:
    def rows(target: Target) -> tuple[int, int]:
        group = _delta(target).num_value_heads // _delta(target).num_key_heads
        return part * group, 2 * group

    return HeadRows(LAYER + "linear_attn.in_proj_ba.weight", axes=1, part=rows)


_LINEAR = LAYER + "linear_attn."
_MIXER = "layers.{i}.mixer."
_DELTA: Table = {
    _MIXER + "conv_qk": ConvRows(_LINEAR + "conv1d.weight", axes=3, part=qk_rows),
    _MIXER + "conv_v": ConvRows(_LINEAR + "conv1d.weight", axes=3, part=v_rows),
    _MIXER + "dt_bias": Rows(_LINEAR + "dt_bias", axes=2),
    _MIXER + "a_log": Rows(_LINEAR + "A_log", axes=2),
    _MIXER + "norm": Same(_LINEAR + "norm.weight"),
    _MIXER + "out": Projection(_LINEAR + "out_proj.weight"),
}
_BY_HEAD: Table = {  # Qwen3-Next
    _MIXER + "qk": Joined((_of_head(0), _of_head(1)), axis=-3),
    _MIXER + "vz": Joined((_of_head(2), _of_head(3)), axis=-4),
    _MIXER + "ba": Joined((_ba(0), _ba(1)), axis=-3),
}
_BY_KIND: Table = {  # Qwen3.5
    _MIXER + "qk": Rows(_LINEAR + "in_proj_qkv.weight", axes=3, part=qk_rows),
    _MIXER + "vz": Joined(
        (Rows(_LINEAR + "in_proj_qkv.weight", axes=3, part=v_rows), Rows(_LINEAR + "in_proj_z.weight", axes=3)), axis=-4
    ),
    _MIXER + "ba": Joined((Rows(_LINEAR + "in_proj_b.weight", axes=2), Rows(_LINEAR + "in_proj_a.weight", axes=2)), axis=-3),
}


def _attention() -> Table:
    table: dict[str, Assembly] = {}
    for ours, kind, axes in (("", "weight", 1), ("_bias", "bias", 1)):
        names = tuple(f"{LAYER}self_attn.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj"))
        table[_MIXER + "qkv" + ours] = GatedQkv(names)
        table[_MIXER + "gate" + ours] = HeadRows(names[0], axes=axes, part=_gate_rows)
    return table


def _gate_rows(target: Target) -> tuple[int, int]:
    return target.attention.head_dim, 2 * target.attention.head_dim


def _table(delta: Table) -> Table:
    experts = moe_tensors(shared="mlp.shared_expert")
    return either(tensors() | _attention(), _DELTA | delta) | experts


_VISION = ("model.visual.", "visual.", "mtp.")
_TEXT = {"model.language_model.": "model."}

ARCHITECTURES = (
    Architecture(
        name="Qwen3NextForCausalLM", model_type="qwen3_next", spec=_qwen3_next, tensors=_table(_BY_HEAD), ignored=("mtp.",)
    ),
    *(
        Architecture(name=name, model_type=kind, spec=spec, tensors=_table(_BY_KIND), renames=_TEXT, ignored=_VISION)
        for name, kind, spec in (
            ("Qwen3_5ForCausalLM", "qwen3_5_text", _qwen3_5),
            ("Qwen3_5ForConditionalGeneration", "qwen3_5", _qwen3_5),
            ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _qwen3_5_moe),
            ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", _qwen3_5_moe),
        )
    ),
)
