"""Zamba 2: Mamba 2 layers, some of which also go through a transformer block that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.architecture import Architecture, HfConfig
from jaxserve.models.families.assembly import Assembly, Halves, Index, Projection, Same, Target
from jaxserve.models.families.from_config import attention, mlp, rms
from jaxserve.models.families.mamba_tensors import mamba2_tensors
from jaxserve.models.families.qkv_assembly import Qkv
from jaxserve.models.families.recurrent_tensors import Joined, Rows, either
from jaxserve.models.families.rope_config import rope
from jaxserve.models.families.tensors import LAYER, Table, norm_tensors
from jaxserve.models.recurrent_spec import Mamba2Spec
from jaxserve.models.spec import DecoderSpec, LayerSpec, SharedSpec


def _zamba2(config: HfConfig) -> DecoderSpec:
    mamba = Mamba2Spec(
        num_heads=config.n_mamba_heads,
        head_dim=config.mamba_headdim,
        state_dim=config.mamba_d_state,
        num_groups=config.mamba_ngroups,
        conv_kernel=config.mamba_d_conv,
        activation="silu",
        in_bias=bool(config.add_bias_linear),
        out_bias=bool(config.add_bias_linear),
        dt_min=float(config.time_step_min),
        norm_eps=1e-5,
    )
    dim = config.attention_head_dim
    position = rope(config, dim=dim) if config.use_mem_rope else None
    shared = SharedSpec(
        block=0,
        attention=attention(config, position, head_dim=dim, scale=(dim / 2) ** -0.5),
        mlp=mlp(config, bias=bool(config.add_bias_linear)),
        rank=config.adapter_rank,
        adapts_attention=bool(config.use_shared_attention_adapter),
    )
    kinds = config.layers_block_type
    if unknown := set(kinds) - {"linear_attention", "hybrid"}:
        raise ModelLoadError(f"layer types {sorted(unknown)} are not supported; jaxserve can do linear_attention, hybrid")
    if shared.adapts_attention and config.num_key_value_heads != config.num_attention_heads:
        raise ModelLoadError(
            f"use_shared_attention_adapter needs as many kv heads as heads; got {config.num_key_value_heads} and "
            f"{config.num_attention_heads}"
        )
    hybrid = [i for i, kind in enumerate(kinds) if kind == "hybrid"]

    def layer(i: int) -> LayerSpec:
        if kinds[i] != "hybrid":
            return LayerSpec(mixer=mamba, mlp=None)
        nth = hybrid.index(i)
        # transformers ties these blocks as it ties the embeddings, so without that each layer has one of its own.
        block = nth % config.num_mem_blocks if config.tie_word_embeddings else nth
        return LayerSpec(mixer=mamba, mlp=None, shared=replace(shared, block=block))

    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=tuple(layer(i) for i in range(config.num_hidden_layers)),
        norm=rms(config),
        tie_embeddings=bool(config.tie_word_embeddings),
        max_position=config.max_position_embeddings,
    )


@dataclass(frozen=True)
class _InLayer(Assembly):
    """An assembly for a parameter outside the layers that is made as one of this layer's attention."""

    inner: Assembly
    layer: LayerSpec

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.inner.patterns

    def shapes(self, target: Target) -> Any:
        return self.inner.shapes(replace(target, layer=self.layer))

    def read(self, tensors: Any, target: Target, index: Index) -> np.ndarray:
        return self.inner.read(tensors, replace(target, layer=self.layer), index)


_OUTSIDE: Table = {
    "embed": Same("model.embed_tokens.weight"),
    "lm_head": Projection("lm_head.weight"),
    "layers.{i}.shared_use.out": Projection(LAYER + "linear.weight"),
} | norm_tensors({"final_norm": "model.final_layernorm"})
_MAMBA = mamba2_tensors(LAYER + "mamba.") | norm_tensors({"layers.{i}.mixer_norm": LAYER + "input_layernorm"})
_HYBRID = mamba2_tensors(LAYER + "mamba_decoder.mamba.") | norm_tensors(
    {"layers.{i}.mixer_norm": LAYER + "mamba_decoder.input_layernorm"}
)


def _table(spec: DecoderSpec) -> Table:
    """Shared weights lie in the first layer that uses them, and so do the later layers' own changes of them."""
    table = _OUTSIDE | either(_MAMBA, _HYBRID)
    users = [(i, layer.shared) for i, layer in enumerate(spec.layers) if layer.shared is not None]
    first: dict[int, str] = {}
    for nth, (i, shared) in enumerate(users):
        if shared.block not in first:
            first[shared.block] = f"model.layers.{i}.shared_transformer."
            table |= _block_table(f"shared.{shared.block}.", first[shared.block], shared)
        table |= _use_table(f"layers.{i}.shared_use.", first[shared.block], nth)
    return table


def _block_table(ours: str, theirs: str, shared: SharedSpec) -> Table:
    qkv = Qkv(tuple(f"{theirs}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")))
    return {
        ours + "qkv": _InLayer(qkv, LayerSpec(mixer=shared.attention, mlp=None)),
        ours + "attention_out": Projection(theirs + "self_attn.o_proj.weight"),
        ours + "up": Halves(theirs + "feed_forward.gate_up_proj.weight"),
        ours + "up_bias": Halves(theirs + "feed_forward.gate_up_proj.bias"),
        ours + "down": Projection(theirs + "feed_forward.down_proj.weight"),
        ours + "down_bias": Same(theirs + "feed_forward.down_proj.bias"),
    } | norm_tensors({ours + "norm": theirs + "input_layernorm", ours + "mlp_norm": theirs + "pre_ff_layernorm"})


def _use_table(ours: str, theirs: str, nth: int) -> Table:
    adapters = [f"{theirs}self_attn.linear_{name}_adapter_list.{nth}." for name in "qkv"]
    up = f"{theirs}feed_forward.gate_up_proj_adapter_list.{nth}."
    return {
        ours + "qkv_in": Joined(tuple(Projection(name + "0.weight") for name in adapters), axis=-3),
        ours + "qkv_out": Joined(tuple(Rows(name + "1.weight", axes=2) for name in adapters), axis=-4),
        ours + "up_in": Projection(up + "0.weight"),
        ours + "up_out": Rows(up + "1.weight", axes=2),
    }


ARCHITECTURES = (
    Architecture(name="Zamba2ForCausalLM", model_type="zamba2", spec=_zamba2, tensors=_table, spare=r"_adapter_list\.\d+\."),
)
