"""GGUF files give the very model that the Hugging Face checkpoint gives, and refuse what they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.errors import ModelLoadError
from jaxserve.models.layers.rope import inverse_frequencies
from jaxserve.models.loading import open_source
from jaxserve.models.spec import DecoderSpec, Llama3Scaling, RopeSpec
from tests.goldens import cases
from tests.models.forward import forward, logit_error, open_and_load
from tests.models.loading.write_gguf import write_gguf


def full_attention(spec: DecoderSpec) -> DecoderSpec:
    """GGUF has no place for a Mistral's or Qwen's window."""
    return replace(spec, layers=tuple(replace(layer, mixer=replace(layer.mixer, window=None)) for layer in spec.layers))


@pytest.mark.parametrize("case", ["llama2", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3_linear"])
def test_same_model_as_the_checkpoint(case: str, tmp_path: Path) -> None:
    model, weights = open_and_load(write_gguf(tmp_path / "model.gguf", case))
    wanted, wanted_weights = open_and_load(cases.write_checkpoint(tmp_path, case))
    assert model.spec == (full_attention(wanted.spec) if case == "mistral" else wanted.spec)
    for parameter, got, want in zip(model.parameters, weights, wanted_weights, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=parameter.path)


def test_logits_equal_transformers(tmp_path: Path) -> None:
    model, weights = open_and_load(write_gguf(tmp_path / "model.gguf", "llama2"))
    tokens, wanted = cases.read_golden("llama2")
    assert logit_error(forward(model, weights, tokens), wanted) < 0.01


def test_what_ends_a_text(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "qwen3", fields={"general.sampling.temp": 0.5})))
    assert source.generation_config == {"eos_token_id": [2, 7], "temperature": 0.5}
    assert source.checkpoint_dtype == "bfloat16"


def test_quantised_rows_are_read_in_parts(tmp_path: Path) -> None:
    """A slice of a quantised tensor, permuted or not, is that slice of the whole."""
    whole = cases.read_tensors("llama2")["model.layers.0.self_attn.q_proj.weight"]
    order = whole.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("q", gguf.quants.quantize(order, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from jaxserve.models.loading.gguf_file import open_gguf
    from jaxserve.models.loading.gguf_source import RestoredTensor, _rope_order

    tensor = RestoredTensor(open_gguf(path).tensors["q"], _rope_order(16, 64), 0.0)
    full = tensor.read((slice(0, 64), slice(0, 64)))
    np.testing.assert_allclose(full, whole, atol=0.01)
    np.testing.assert_array_equal(tensor.read((slice(20, 50), slice(3, 7))), full[20:50, 3:7])


def llama3_divisors(original: int) -> np.ndarray:
    scaling = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=original)
    plain = RopeSpec(theta=5e5, rotary_dim=16)
    return (inverse_frequencies(plain) / inverse_frequencies(replace(plain, scaling=scaling))).astype(np.float32)


def test_llama3_rope_is_found_again(tmp_path: Path) -> None:
    fields, tensors = {"llama.rope.freq_base": 5e5}, {"rope_freqs.weight": llama3_divisors(8192)}
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "llama2", fields=fields, tensors=tensors)))
    wanted = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    assert {layer.mixer.rope for layer in source.spec.layers} == {RopeSpec(theta=5e5, rotary_dim=16, scaling=wanted)}
    assert "rope_freqs.weight" not in source.tensors


@pytest.mark.parametrize(
    "fields, tensors, message",
    [
        ({"general.architecture": "mamba"}, {}, "GGUF architecture 'mamba' is not supported. Known ones: llama, qwen2"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count=8, which is not supported"),
        ({"llama.attention.sliding_window": 16}, {}, "llama.attention.sliding_window=16"),
        ({"{arch}.block_count": None}, {}, "lacks llama.block_count"),
        ({"llama.rope.dimension_count": 8}, {}, "llama.rope.dimension_count=8 is not supported; wanted the head's 16"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "rope type .*yarn"),
        ({"{arch}.attention.head_count": [4, 4, 2]}, {}, "llama.attention.head_count must be a positive number; got .4, 4, 2"),
        ({"{arch}.embedding_length": 0}, {}, "llama.embedding_length must be a positive number; got 0"),
        ({"{arch}.rope.freq_base": "high"}, {}, "does not make sense"),
        ({"general.alignment": "x"}, {}, "not a whole GGUF file"),
        ({"split.count": 2}, {}, "one of several"),
        ({"llama.rope.freq_base": 5e5}, {"rope_freqs.weight": llama3_divisors(4000)}, "rope_freqs.weight is not Llama 3's"),
    ],
)
def test_refuses(fields: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama2", fields=fields, tensors=tensors)
    with pytest.raises(ModelLoadError, match=message):
        open_source(str(path))


@pytest.mark.parametrize(
    "pattern, slides",
    [(None, [True] * 5 + [False, True]), (2, [True, False] * 3 + [True]), ([True, False, True, True, True, True, False], None)],
)
def test_gemma3_sliding_layers(pattern: Any, slides: list[bool] | None, tmp_path: Path) -> None:
    fields = {"{arch}.attention.sliding_window_pattern": pattern}
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "gemma3_text", fields=fields)))
    assert [layer.mixer.window is not None for layer in source.spec.layers] == (slides or pattern)


def test_gemma3_score_scale_is_by_size(tmp_path: Path) -> None:
    """Converters do not write it: the 27B, with its 62 layers, has another than the rest."""
    for layers, wanted in ((7, 32), (62, 64 // 4)):
        fields = {"{arch}.attention.scale": None, "{arch}.block_count": layers}
        source = open_source(str(write_gguf(tmp_path / "m.gguf", "gemma3_text", fields=fields)), "dummy")
        assert source.spec.layers[0].mixer.scale == pytest.approx(wanted**-0.5)


def test_refuses_metadata_that_makes_no_sense(tmp_path: Path) -> None:
    for name, value in (("attention.sliding_window_pattern", 0), ("attention.scale", "x"), ("block_count", 2**31)):
        path = write_gguf(tmp_path / "m.gguf", "gemma3_text", fields={f"{{arch}}.{name}": value})
        with pytest.raises(ModelLoadError, match="does not make sense|number of layers"):
            open_source(str(path))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"blk.0.extra.weight": np.ones(3, np.float32)}, "holds the tensor blk.0.extra.weight"),
        (
            {"blk.0.attn_k.weight": np.ones((32, 64), np.float32)},
            r"k_proj.weight has shape \[32, 64\]; the config wants \[64, 64\]",
        ),
    ],
)
def test_refuses_tensors(tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama2", tensors=tensors)
    with pytest.raises(ModelLoadError, match=message):
        open_and_load(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 500, 20_000])
def test_refuses_a_truncated_file(keep: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama2")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="is not a whole GGUF file"):
        open_source(str(path))


def test_refuses_sizes_past_the_end_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    huge = (2**62).to_bytes(8, "little")
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + huge + huge + huge + b"name")
    with pytest.raises(ModelLoadError, match="it ends at byte"):
        open_source(str(path))


def test_dummy_reads_the_config_only(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "qwen2")), "dummy")
    assert source.kind == "dummy" and not source.tensors and source.spec.d_model == 64
