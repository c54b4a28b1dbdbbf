"""8-bit weights: linear against its definition in NumPy, and a model whose logits stay near those of the float32 weights."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, step
from jaxserve.errors import ConfigError
from jaxserve.models.description import Quantization
from jaxserve.models.interface import Runtime, StateSpec
from jaxserve.models.layers import unsummed
from jaxserve.models.layers.linear import linear
from jaxserve.models.layers.quantized import FP8, Fp8Weight, quantize_fp8
from jaxserve.models.loading import describe_model, load_weights, open_source
from jaxserve.pallas_kernels.quantized_rows import api
from jaxserve.pallas_kernels.residual_norm import reference as residual_norm
from jaxserve.plan import PlanShape
from jaxserve.runner import abstract_state
from jaxserve.sharding import Shardings, make_mesh
from tests.goldens import cases
from tests.models.forward import forward, logit_error, one_device


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    """x in e4m3 with a scale along the axis, as float32 again."""
    scale = np.abs(x).max(axis, keepdims=True) / 448
    result: np.ndarray = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return result


@pytest.mark.parametrize(("shape", "contract"), [((16, 24), 1), ((16, 2, 12), 1), ((4, 8, 24), 2)])
def test_linear_rounds_weights_by_channel_and_activations_by_token(shape: tuple[int, ...], contract: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32) * np.linspace(0.1, 10, shape[-1], dtype=np.float32)
    x = rng.standard_normal((5, *shape[:contract])).astype(np.float32)
    bias = rng.standard_normal(shape[contract:]).astype(np.float32)
    inputs = int(np.prod(shape[:contract]))
    wanted = rounded(x.reshape(5, inputs), 1) @ rounded(w.reshape(inputs, -1), 0)

    quantized = quantize_fp8(jnp.asarray(w), contract)
    got = linear(jnp.asarray(x), quantized, jnp.asarray(bias), contract=contract)

    assert quantized.values.dtype == FP8 and quantized.scales.shape == shape[contract:]
    np.testing.assert_allclose(got, wanted.reshape(5, *shape[contract:]) + bias, rtol=1e-4, atol=1e-3)


def test_a_token_of_zeros_stays_zero() -> None:
    w = quantize_fp8(jnp.ones((8, 4)), 1)
    np.testing.assert_array_equal(linear(jnp.zeros((2, 8)), w), np.zeros((2, 4)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_checkpoint(tmp_path_factory.mktemp("fp8"), "llama")


def test_logits_stay_near_those_of_the_float32_weights(checkpoint: Path) -> None:
    tokens = np.arange(24)[None]
    source = open_source(str(checkpoint))
    logits = []
    for quantization in (None, "fp8"):
        model = describe_model(source, dtype=jnp.float32, quantization=quantization)
        weights = load_weights(source, model, sharding_for=one_device)
        assert [(w.shape, w.dtype) for w in weights] == [(a.shape, a.dtype) for a in model.abstract]
        logits.append(forward(model, weights, tokens))
    error = np.sqrt(np.mean((logits[1] - logits[0]) ** 2)) / logits[0].std()
    assert 1e-3 < error < 0.3, "e4m3 has 3 bits: neither exact nor far off"


def test_what_is_rounded_together_with_what_makes_it_gives_the_same_logits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, gated activations and attention's outputs as a GPU's kernels round them: here the reference does, in float32."""
    source, calls = open_source(str(checkpoint)), Counter[str]()
    model = describe_model(source, dtype=jnp.float32, quantization="fp8")
    weights, tokens = load_weights(source, model, sharding_for=one_device), np.arange(24)[None]
    plain = forward(model, weights, tokens)

    def counted(name: str, *args: Any, f: Any = api._run, **options: Any) -> Any:
        calls[name] += 1
        return f(name, *args, **options)

    monkeypatch.setattr(api, "_run", counted)
    monkeypatch.setattr(Runtime, "rounding", "mosaic_gpu")
    monkeypatch.setattr(Runtime, "rotates_and_writes", True)
    assert logit_error(forward(model, weights, tokens), plain) < 1e-3
    assert calls == {"quantize": 1, "quantize_gated": 1, "quantize_normed": 2}, "of the one layer that is traced"


@pytest.mark.parametrize("quantization, most", [pytest.param(None, 0.05, marks=pytest.mark.extra), ("fp8", 0.5)])
def test_what_norms_and_rope_add_up_gives_the_same_logits(
    quantization: Quantization | None, most: float, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in parts, and sums that wait for the next norm, the next layer's too, as on a GPU; here their references add up.

    Up to what bfloat16 makes of another order, and rounding to 8 bits of that: from float32's logits both are as far.
    """
    source, calls = open_source(str(checkpoint)), []
    model = describe_model(source, dtype=jnp.bfloat16, quantization=quantization)
    weights, tokens = load_weights(source, model, sharding_for=one_device), np.arange(24)[None]
    monkeypatch.setattr(Runtime, "rounding", "mosaic_gpu")
    monkeypatch.setattr(Runtime, "rotates_and_writes", True)
    plain = forward(model, weights, tokens)
    add = residual_norm.add_and_normalize
    monkeypatch.setattr(residual_norm, "add_and_normalize", lambda *a: calls.append(a[1].shape[0]) or add(*a))
    monkeypatch.setattr(Runtime, "sums_in_kernels", True)
    monkeypatch.setattr(unsummed, "split_count", lambda rows, inputs, outputs: 2)
    traced_anew = Runtime("cpu", shares_pages=True)
    assert logit_error(forward(model, weights, tokens, runtime=traced_anew), plain) < most
    assert calls == [2] * 3, "the mlp's norm in the first layer, both in the others, which are traced once"


def test_matmuls_of_the_layers_are_quantised_and_nothing_else(checkpoint: Path) -> None:
    model = describe_model(open_source(str(checkpoint)), dtype=jnp.float32, quantization="fp8")
    quantised = {p.path.split(".", 2)[-1] for p in model.parameters if p.form == "fp8"}
    assert quantised == {"mixer.qkv", "mixer.out", "mlp.up", "mlp.down"}


MIXERS = (
    "mamba",
    "mamba2",
    "rwkv",
    "minimax",
    "qwen3_next",
    "recurrent_gemma",
    "lfm2",
    "zamba2",
    "deepseek_v2",
    "gpt_oss",
    "doge",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_every_kind_of_layer_takes_quantised_weights(name: str, tmp_path: Path) -> None:
    """What is quantised is read by `linear` alone."""
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config(name)))
    model = describe_model(open_source(str(tmp_path), "dummy"), dtype=jnp.float32, quantization="fp8")
    mesh, shape = make_mesh(1), PlanShape(4, 4, 4, 8)
    state = abstract_state(model.cache_specs, 8, 16, 4, 2, jnp.dtype(jnp.float32), Shardings(mesh), kv_dtype=jnp.dtype(FP8))
    for cache, spec in zip(state.caches, model.cache_specs, strict=True):
        assert (cache.dtype == FP8) == (not isinstance(spec, StateSpec)), "only pages are of 8 bits"
    forward = partial(step.forward, apply_model=model.apply, runtime=Runtime("cpu", mesh), shape=shape, page_size=16)
    last_tokens, packed = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (4, shape.size))
    _, results = jax.eval_shape(forward, model.abstract, state, last_tokens, packed)
    assert any(p.form == "fp8" for p in model.parameters) and results.logits.shape == (4, model.vocab_size)


@pytest.mark.usefixtures("nothing_kept_compiled")
def test_quantising_on_two_devices_gives_the_same_weights(checkpoint: Path) -> None:
    source = open_source(str(checkpoint))
    model = describe_model(source, dtype=jnp.float32, quantization="fp8")
    alone = load_weights(source, model, sharding_for=one_device)
    shared = load_weights(source, model, sharding_for=Shardings(make_mesh(2)).of)
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert any(len({s.index for s in w.addressable_shards}) == 2 for w in shared if w.dtype == FP8), "nothing was cut"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_kept_compiled")
def test_an_engine_serves_fp8_at_one_and_two_devices(checkpoint: Path) -> None:
    """Weights, activations and pages of 8 bits."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    texts = []
    for devices in (1, 2):
        llm = LLM(str(checkpoint), quantization="fp8", kv_cache_dtype="fp8", tensor_parallel_size=devices, kv_cache_memory_bytes=2**20, max_model_len=32,
                  max_num_seqs=1, max_num_batched_tokens=32, skip_tokenizer_init=True)  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}, {"prompt_token_ids": [9, 8, 7]}], params, use_tqdm=False)
        assert "float8_e4m3fn" in llm.engine.description["KV pool"]
        texts.append([o.outputs[0].token_ids for o in outputs])
        llm.shutdown()
    assert texts[0] == texts[1]


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of fp8"):
        LLM("anything", quantization="int3")


def test_quantised_weights_pass_through_jit() -> None:
    w = quantize_fp8(jnp.eye(4), 1)
    assert isinstance(jax.jit(lambda w: w)(w), Fp8Weight)
