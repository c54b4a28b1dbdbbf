"""Checkpoints whose weights are e4m3 with scales: the same numbers as their weights dequantised with NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError, ModelLoadError
from jaxserve.models.interface import ShardingFor
from jaxserve.models.layers.quantized import FP8
from jaxserve.models.loading import ModelDescription, describe_model, load_weights, open_source
from jaxserve.models.loading.hf_folder import _open_tensors
from jaxserve.sharding import Shardings, make_mesh
from tests.goldens import cases
from tests.models.forward import forward, one_device, open_and_load

E4M3 = ml_dtypes.float8_e4m3fn
TOKENS = np.arange(1, 25)[None]


def compressed(strategy: str, inputs: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = float8 | {"strategy": strategy, "dynamic": False, "block_structure": [16, 24] if strategy == "block" else None}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs and float8 | inputs,
        "output_activations": None,
    }
    groups = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized"} | groups | fields


TOKEN, STATIC = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 24]}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # how scales are laid out, and what config.json says
    "channel": ("channel", compressed("channel", TOKEN)),
    "tensor": ("tensor", compressed("tensor", TOKEN)),
    "static": ("tensor", compressed("tensor", STATIC)),
    "static_fp8": ("tensor", {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}),
    "weights_only": ("channel", compressed("channel", None)),
    "block": ("block", BLOCK_FP8),
    "block_compressed": ("block", compressed("block", {"strategy": "group", "dynamic": True})),
}


def quantised(w: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [out, in] as e4m3 values and their scales, and what both stand for."""
    rows, columns = w.shape
    height, width = {"channel": (1, columns), "tensor": (rows, columns), "block": (16, 24)}[layout]
    parts = [
        [np.abs(w[i : i + height, j : j + width]).max() / 448 for j in range(0, columns, width)] for i in range(0, rows, height)
    ]
    scale = np.asarray(parts, np.float32)
    spread = np.repeat(np.repeat(scale, height, 0), width, 1)[:rows, :columns]
    values = (w / spread).astype(E4M3)
    return values, scale[0] if layout == "tensor" else scale, values.astype(np.float32) * spread


def write(folder: Path, case: str, form: str, **config: Any) -> tuple[Path, Path]:
    """A case as a quantised checkpoint, and its dequantised weights as a plain one."""
    layout, quantization = FORMS[form]
    tensors, plain = {}, {}
    for name, w in cases.read_tensors(case).items():
        tensors[name] = plain[name] = w
        if w.ndim == 2 and name.endswith("_proj.weight"):
            tensors[name], scale, plain[name] = quantised(w, layout)
            tensors[name + ("_scale_inv" if form == "block" else "_scale")] = scale
            if form.startswith("static"):
                tensors[name.removesuffix("weight") + "input_scale"] = np.full(1, 0.02, np.float32)
    fields = cases.read_config(case) | {"quantization_config": quantization} | config
    eight = cases.write_checkpoint(folder / "eight", case, config=fields, tensors=tensors)
    return eight, cases.write_checkpoint(folder / "plain", case, tensors=plain)


def load_kept(folder: Path, sharding_for: ShardingFor = one_device, **options: Any) -> tuple[ModelDescription, tuple]:
    source = open_source(str(folder))
    model = describe_model(source, dtype=jnp.float32, keep_quantized=True, **options)
    weights = load_weights(source, model, sharding_for=sharding_for)
    assert [(w.shape, w.dtype) for w in weights] == [(a.shape, a.dtype) for a in model.abstract]
    return model, weights


@pytest.mark.parametrize("form", FORMS)
def test_dequantised_weights_are_numpy_s(form: str, tmp_path: Path) -> None:
    """As `convert` and programs of one's own read them."""
    eight, plain = write(tmp_path, "llama", form)
    for got, want in zip(open_and_load(eight)[1], open_and_load(plain)[1], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case, form", [("llama", "channel"), ("llama", "tensor"), ("phi3", "channel"), ("qwen3_moe", "channel")])
def test_kept_weights_stand_for_the_same_numbers(case: str, form: str, tmp_path: Path) -> None:
    eight, plain = write(tmp_path, case, form)
    model, weights = load_kept(eight)
    _, wanted = open_and_load(plain)
    arrays, kept = iter(weights), set()
    for parameter, want in zip(model.parameters, wanted, strict=True):
        value = parameter.value(arrays, "xla")
        if parameter.form == "plain":
            np.testing.assert_array_equal(value, want)
            continue
        kept.add(parameter.path.split(".", 2)[-1])
        at, count = parameter.batch, parameter.contract
        inputs_last = np.moveaxis(np.asarray(want), range(at, at + count), range(-count, 0))
        scales = np.asarray(value.scales).reshape(*value.scales.shape, *[1] * count)
        assert value.values.dtype == FP8 and value.input_scale is None
        np.testing.assert_array_equal(np.asarray(value.values).astype(np.float32) * scales, inputs_last)
    experts = {"mlp.experts_up", "mlp.experts_down"} if case == "qwen3_moe" else set()
    assert kept == {"mixer.qkv", "mixer.out", "mlp.up", "mlp.down"} | experts


@pytest.mark.slow
@pytest.mark.parametrize("case, form", [("llama", "static"), ("qwen3_moe", "channel")])
def test_logits_of_kept_weights_are_near_those_of_dequantised_ones(case: str, form: str, tmp_path: Path) -> None:
    """Only activations are rounded beyond that."""
    eight, plain = write(tmp_path, case, form)
    got, want = forward(*load_kept(eight), TOKENS), forward(*open_and_load(plain), TOKENS)
    error = np.sqrt(np.mean((got - want) ** 2)) / want.std()
    assert 1e-3 < error < 0.2, "e4m3 has 3 bits: neither exact nor far off"


@pytest.mark.parametrize("form", ["block", "block_compressed", "weights_only"])
def test_blocks_and_weights_alone_are_dequantised(form: str, tmp_path: Path) -> None:
    eight, plain = write(tmp_path, "llama", form)
    model, weights = load_kept(eight)
    assert all(p.form == "plain" for p in model.parameters)
    for got, want in zip(weights, open_and_load(plain)[1], strict=True):
        np.testing.assert_array_equal(got, want)


def test_experts_in_blocks(tmp_path: Path) -> None:
    """And latent attention, whose up-projection is read in two parts: DeepSeek V3's checkpoints."""
    eight, plain = write(tmp_path, "deepseek_v3", "block")
    for got, want in zip(load_kept(eight)[1], open_and_load(plain)[1], strict=True):
        np.testing.assert_array_equal(got, want)


def test_blocks_are_rounded_again_by_channel_where_that_is_asked_for(tmp_path: Path) -> None:
    model, weights = load_kept(write(tmp_path, "llama", "block")[0], quantization="fp8")
    assert {p.form for p in model.parameters if p.contract is not None} == {"fp8"} and len(weights) > len(model.parameters)


@pytest.mark.usefixtures("nothing_kept_compiled")
@pytest.mark.parametrize("case, form", [("llama", "static"), ("qwen3_moe", "channel"), ("llama", "block")])
def test_two_devices_read_the_same_weights(case: str, form: str, tmp_path: Path) -> None:
    eight, _ = write(tmp_path, case, form)
    (_, alone), (_, shared) = load_kept(eight), load_kept(eight, Shardings(make_mesh(2)).of)
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    if form != "block":
        assert any(len({s.index for s in w.addressable_shards}) == 2 for w in shared if w.dtype == FP8), "nothing was cut"


def test_static_scales_are_the_checkpoint_s(tmp_path: Path) -> None:
    eight, _ = write(tmp_path, "llama", "static_fp8")
    model, weights = load_kept(eight)
    scales = {name: w for name, w in zip(model.paths, weights, strict=True) if name.endswith("input_scale")}
    assert len(scales) == 4 * 3 and {float(s) for s in scales.values()} == {float(np.float32(0.02))}


@pytest.mark.parametrize("form", ["channel", "static", "block"])
def test_dummy_weights_take_the_checkpoint_s_form(form: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("llama") | {"quantization_config": FORMS[form][1]}))
    source = open_source(str(tmp_path), "dummy")
    model = describe_model(source, dtype=jnp.float32, keep_quantized=True)
    wanted = {"channel": "fp8", "static": "fp8_static", "block": "plain"}[form]
    assert {p.form for p in model.parameters if p.contract is not None} == {wanted}
    weights = load_weights(source, model, sharding_for=one_device)
    assert [(w.shape, w.dtype) for w in weights] == [(a.shape, a.dtype) for a in model.abstract]


@pytest.mark.parametrize("is_said", [True, False])
def test_scales_for_keys_and_values(is_said: bool, tmp_path: Path) -> None:
    """They belong to 8-bit pages; pages of the model's dtype need none, and 8-bit ones cannot take them."""
    tensors = cases.read_tensors("llama") | {
        f"model.layers.{i}.self_attn.{kind}_scale": np.ones(1, np.float32) for i in range(3) for kind in "kv"
    }
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False} if is_said else None
    config = cases.read_config("llama") | {"quantization_config": compressed("channel", TOKEN, kv_cache_scheme=scheme)}
    folder = cases.write_checkpoint(tmp_path, "llama", config=config, tensors=tensors)
    assert len(open_and_load(folder)[1]) > 0
    with pytest.raises(ConfigError, match="kv_cache_scheme has scales"):
        LLM(str(folder), kv_cache_dtype="fp8", skip_tokenizer_init=True)


@pytest.mark.extra
def test_an_engine_serves_it(tmp_path: Path) -> None:
    eight, _ = write(tmp_path, "llama", "channel")
    llm = LLM(
        str(eight),
        kv_cache_memory_bytes=2**20,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    tokens = llm.generate([{"prompt_token_ids": TOKENS[0].tolist()}], params, use_tqdm=False)[0].outputs[0].token_ids
    assert "8 bits" in llm.engine.description["dtype"]
    llm.shutdown()
    assert tokens[0] == int(forward(*load_kept(eight), TOKENS)[0, -1].argmax())


def test_tensors_of_8_bits_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    eight, _ = write(tmp_path, "llama", "channel")
    (eight / "config.json").write_text(json.dumps(cases.read_config("llama")))
    with pytest.raises(ModelLoadError, match="F8_E4M3.*quantization_config"):
        open_source(str(eight))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"quant_method": "fp8", "activation_scheme": "group"}, "activation_scheme 'group'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"blocks of \[128\]"),
        ({"quant_method": "fp8", "rotate": True}, "rotate=True"),
        (compressed("channel", TOKEN, format="pack-quantized"), "format 'pack-quantized'"),
        (compressed("channel", TOKEN, transform_config={"R1": {}}), "transform_config"),
        (compressed("channel", TOKEN, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed("group", TOKEN), "weights .*'strategy': 'group'"),
        (compressed("channel", {"strategy": "token", "dynamic": "local"}), "dynamic='local'"),
        (compressed("channel", {"strategy": "token", "dynamic": False}), "static input_activations by token"),
        (compressed("channel", TOKEN, config_groups={}), "in 0 ways"),
    ],
)
def test_other_quantisations_are_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("llama") | {"quantization_config": config}))
    with pytest.raises(ModelLoadError, match=f"quantised with .*{message}"):
        open_source(str(tmp_path), "dummy")


@pytest.mark.parametrize(
    "name, scale, message",
    [
        ("weight_scale", None, "lacks its scale"),
        ("weight_scale", np.ones((3, 1), np.float32), r"has shape \[3, 1\]; jaxserve can do one for all, one for each row$"),
        ("input_scale", None, "lacks its scale"),
    ],
)
def test_a_missing_or_misshapen_scale_is_refused(name: str, scale: np.ndarray | None, message: str, tmp_path: Path) -> None:
    eight, _ = write(tmp_path, "llama", "static")
    full = f"model.layers.1.self_attn.q_proj.{name}"
    tensors = {n: t.read(tuple(slice(0, k) for k in t.shape)) for n, t in _open_tensors(eight).items() if n != full}
    save_file(tensors | ({} if scale is None else {full: scale}), eight / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"q_proj.weight.*{message}"):
        open_source(str(eight))
