"""Configs: which architecture they name, old and new spellings of the same thing, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import ModelLoadError
from jaxserve.models.layers.rope import inverse_frequencies
from jaxserve.models.loading.hf_config import understand_config
from jaxserve.models.registry import ARCHITECTURES, find_architecture
from jaxserve.models.spec import DecoderSpec, LinearScaling
from tests.goldens import cases


def spec_of(case: str, drop: tuple[str, ...] = (), **changes: Any) -> DecoderSpec:
    """The spec of a case whose config has some fields dropped and some changed."""
    config = {name: value for name, value in cases.read_config(case).items() if name not in drop}
    return understand_config(config | changes)[2]


def test_unknown_architecture_names_those_alike() -> None:
    with pytest.raises(
        ModelLoadError, match="not supported: Llama5ForCausalLM. Of like name: .*LlamaForCausalLM.* `jaxserve models`"
    ):
        find_architecture({"architectures": ["Llama5ForCausalLM"]})
    with pytest.raises(ModelLoadError, match="not supported: BertModel. `jaxserve models` lists"):
        find_architecture({"architectures": ["BertModel"], "model_type": "bert"})
    with pytest.raises(ModelLoadError, match="model_type 'bert'"):
        find_architecture({"model_type": "bert"})
    with pytest.raises(ModelLoadError, match="model_type None"):
        find_architecture({})


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_model_type_alone_is_enough(architecture: Any) -> None:
    assert find_architecture({"model_type": architecture.model_type}) is architecture


def test_code_of_the_model_is_ignored() -> None:
    assert spec_of("llama", auto_map={"AutoConfig": "evil.Config"}) == spec_of("llama")


def test_class_and_model_type_must_agree() -> None:
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM with model_type 'mamba'; wanted 'llama'"):
        spec_of("llama", model_type="mamba")


@pytest.mark.parametrize("name, kind", [("InternLM3ForCausalLM", "internlm3"), ("IQuestCoderForCausalLM", "iquestcoder")])
def test_llama_by_other_names(name: str, kind: str) -> None:
    assert spec_of("llama", architectures=[name], model_type=kind) == spec_of("llama")


def test_internlm3_has_names_of_its_own_for_biases() -> None:
    names = {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}
    got = spec_of("llama_bias", ("attention_bias", "mlp_bias"), **names, qkv_bias=True, bias=True)
    assert got == spec_of("llama_bias")


def test_llama_old_rope_fields() -> None:
    rope = dict(cases.read_config("llama")["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for name in ("rope_type", "type"):
        assert spec_of("llama", ("rope_parameters",), rope_theta=theta, rope_scaling=rope | {name: kind}) == spec_of("llama")
    plain = spec_of("llama2", ("rope_parameters",), rope_theta=500.0, rope_scaling=None)
    assert plain == spec_of("llama2")


def test_gemma3_old_rope_fields() -> None:
    old = {
        "rope_theta": 50000.0,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    assert spec_of("gemma3_linear", ("rope_parameters", "layer_types", "_sliding_window_pattern"), **old) == spec_of(
        "gemma3_linear"
    )


def test_gemma3_layers() -> None:
    layers = spec_of("gemma3_linear").layers
    assert [layer.mixer.window for layer in layers] == [8, 8, 8, 8, 8, None, 8]
    ropes = [layer.mixer.rope for layer in layers]
    assert ropes[5] is not None and ropes[0] is not None
    assert (ropes[5].theta, ropes[5].scaling) == (50000.0, LinearScaling(factor=8.0))
    assert (ropes[0].theta, ropes[0].scaling) == (500.0, None)


def test_windows() -> None:
    assert [layer.mixer.window for layer in spec_of("qwen2_window").layers] == [None, 8, 8]
    assert {layer.mixer.window for layer in spec_of("qwen2", sliding_window=8).layers} == {None}  # use_sliding_window is off
    assert {layer.mixer.window for layer in spec_of("mistral").layers} == {16}
    assert {layer.mixer.window for layer in spec_of("mistral", sliding_window=None).layers} == {None}


def test_head_dim_comes_from_the_width_if_not_given() -> None:
    with_it = spec_of("qwen2", head_dim=16)
    assert spec_of("qwen2") == with_it
    assert spec_of("qwen2", head_dim=24).layers[0].mixer.head_dim == 24


def test_attention_bias_of_llama_reaches_every_projection() -> None:
    mixer = spec_of("llama_bias").layers[0].mixer
    assert (mixer.qkv_bias, mixer.out_bias) == (True, True)
    mixer = spec_of("qwen2").layers[0].mixer
    assert (mixer.qkv_bias, mixer.out_bias) == (True, False)


def test_cwm_with_biases() -> None:
    assert all(layer.mlp.bias for layer in spec_of("cwm", mlp_bias=True).layers)


def test_fields_of_rope_that_change_nothing() -> None:
    plain = {"rope_type": "default", "rope_theta": 500.0}
    assert spec_of("llama", rope_parameters=plain | {"original_max_position_embeddings": 32}) == spec_of(
        "llama2", num_key_value_heads=2
    )
    yarn = cases.read_config("llama_yarn")["rope_parameters"]
    assert spec_of("llama_yarn", rope_parameters=yarn | {"finetuned": True}) == spec_of("llama_yarn")


def test_odd_number_of_rotated_dimensions() -> None:
    """transformers turns one more, by frequencies of the odd number."""
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.2}}
    rope = spec_of("gpt_neox", **changes).layers[0].rope  # heads of 16
    assert rope is not None and rope.rotary_dim == 4
    np.testing.assert_allclose(inverse_frequencies(rope), [1.0, 100.0 ** (-2 / 3)])


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope type .*proportional.* is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope type 'linear' takes rope_theta, factor|factor"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "mrope_section"),
        ("llama", {"partial_rotary_factor": 0.5}, "rope over part of each head"),
        ("llama", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ("llama", {"hidden_size": "wide"}, "does not make sense for LlamaForCausalLM.*hidden_size"),
        ("llama", {"vocab_size": 0}, "vocab_size must be at least 1; got 0"),
        ("mistral", {"sliding_window": -5}, "window must be at least 1; got -5"),
        ("llama", {"num_hidden_layers": 10**9}, "number of layers must be from 1 to 1000; got 1000000000"),
        ("gpt2", {"n_layer": 10**9}, "number of layers must be from 1 to 1000; got 1000000000"),
        ("gptj", {"rotary_dim": None}, "GPTJForCausalLM.*rotary_dim"),
        ("mpt", {"attn_config": {"alibi": False}}, "with alibi=False is not supported; jaxserve can do alibi=True"),
        ("doge", {"is_moe": True}, "doge with is_moe=True is not supported"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "moe_normalize_expert_weights=2.0 is not supported"),
        ("deepseek_v2", {"topk_method": "noaux"}, "topk_method 'noaux' is not supported"),
        ("gemma4_small", {"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input=100 is not supported"),
        ("gemma3n_text", {"num_kv_shared_layers": 4}, "gemma3n|Gemma3n"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 3}, "jaxserve can do swa_num_key_value_heads=2"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 0, 1]}, "jaxserve can do hybrid_layer_pattern=.0, 1, 0."),
        ("kimi_linear", {"mla_use_nope": False}, "jaxserve can do mla_use_nope=True"),
        ("mixtral", {"num_experts_per_tok": 9}, "each token must have from 1 to 4 experts; got 9"),
        ("helium", {"head_dim": 24}, "helium wants num_attention_heads . head_dim to be hidden_size=64; got 4 . 24"),
        ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "must be an even number; got 3"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "mistral with layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types|num_hidden_layers"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_do(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        spec_of(case, **changes)


def test_untied_gemma_has_a_head() -> None:
    assert not spec_of("gemma3_text", tie_word_embeddings=False).tie_embeddings
    assert replace(spec_of("gemma3_text"), tie_embeddings=False) == spec_of("gemma3_text", tie_word_embeddings=False)


def test_longrope_is_chosen_by_the_longest_text() -> None:
    spec = spec_of("phi3_longrope")  # 64 tokens at first, 256 in all
    short, long = spec.for_context(64), spec.for_context(65)
    assert spec.for_context(None) == short and (short.max_position, long.max_position) == (64, 256)
    factors = cases.read_config("phi3_longrope")["rope_parameters"]
    for model, name in ((short, "short_factor"), (long, "long_factor")):
        assert {layer.rope.scaling.factors for layer in model.layers} == {tuple(factors[name])}
    assert spec_of("llama").for_context(10**6) == spec_of("llama")
