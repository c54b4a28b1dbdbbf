"""RecurrentGemma: Griffin's recurrent blocks, and attention over a window in some layers."""

from __future__ import annotations

import jax.numpy as jnp

from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Projection, Same, Stack
from jaxserve.models.families.from_config import activation, attention, decoder, mlp, rms
from jaxserve.models.families.recurrent_tensors import ConvRows, Joined, either
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, tensors
from jaxserve.models.recurrent_spec import RgLruSpec
from jaxserve.models.spec import DecoderSpec, MixerSpec


def _recurrent_gemma(config: HfConfig) -> DecoderSpec:
    act = activation(config.hidden_activation)
    mixers: dict[str, MixerSpec] = {
        "sliding_attention": attention(
            config,
            rope(config, is_partial=True, is_even=True),
            window=config.attention_window_size,
            qkv_bias=bool(config.attention_bias),
            out_bias=True,
        ),
        "linear_attention": RgLruSpec(
            width=config.lru_width,
            num_blocks=config.num_attention_heads,
            conv_kernel=config.conv1d_width,
            activation=act,
        ),
    }
    kinds = config.layers_block_type
    return decoder(
        config,
        rms(config, unit_offset=True),
        lambda i: mixers[kinds[i]],
        mlp(config, config.intermediate_size // 2, activation=act, bias=True),
        embed_scale=float(jnp.bfloat16(config.hidden_size**0.5)),  # so the code it was trained with has it, in any dtype
        logit_softcap=config.logits_soft_cap,
        max_position=1 << 20,  # the window and the state do not grow, so the model itself knows no end
    )


_BLOCK = LAYER + "temporal_block."
_LRU = _BLOCK + "rg_lru."
_RECURRENT: Table = {
    "layers.{i}.mixer.into": Stack((_BLOCK + "linear_y.weight", _BLOCK + "linear_x.weight")),
    "layers.{i}.mixer.into_bias": Stack((_BLOCK + "linear_y.bias", _BLOCK + "linear_x.bias")),
    "layers.{i}.mixer.conv": ConvRows(_BLOCK + "conv_1d.weight"),
    "layers.{i}.mixer.conv_bias": Same(_BLOCK + "conv_1d.bias"),
    "layers.{i}.mixer.gates": Joined((Same(_LRU + "input_gate_weight"), Same(_LRU + "recurrent_gate_weight")), axis=-4),
    "layers.{i}.mixer.gates_bias": Joined((Same(_LRU + "input_gate_bias"), Same(_LRU + "recurrent_gate_bias")), axis=-3),
    "layers.{i}.mixer.rate": Same(_LRU + "recurrent_param"),
    "layers.{i}.mixer.out": Projection(_BLOCK + "linear_out.weight"),
    "layers.{i}.mixer.out_bias": Same(_BLOCK + "linear_out.bias"),
}
_TENSORS = either(
    tensors(
        final_norm="model.final_norm",
        mixer_norm="temporal_pre_norm",
        mlp_norm="channel_pre_norm",
        qkv=("temporal_block.q_proj", "temporal_block.k_proj", "temporal_block.v_proj"),
        out="temporal_block.o_proj",
        up=("mlp_block.gate_proj", "mlp_block.up_proj"),
        down="mlp_block.down_proj",
    ),
    _RECURRENT,
)

ARCHITECTURES = (
    Architecture(name="RecurrentGemmaForCausalLM", model_type="recurrent_gemma", spec=_recurrent_gemma, tensors=_TENSORS),
)
