"""Placing weights: slices for shards, progress, dummies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.families.assembly import Assembly, FusedQkv, Index, Projection, Same, Stack, Target, transpose
from jaxserve.models.loading import describe_model, load_weights, open_source
from jaxserve.models.spec import AttentionSpec, LayerSpec, MlpSpec
from tests.goldens import cases
from tests.models.forward import one_device

D, F, N, K, H = 12, 8, 8, 2, 4


def layer(kv_repeat: int = 1) -> LayerSpec:
    mixer = AttentionSpec(num_heads=N, num_kv_heads=K, head_dim=H, scale=1.0, rope=None, kv_repeat=kv_repeat)
    return LayerSpec(mixer=mixer, mlp=MlpSpec(dim=F, activation="silu"))


def targets() -> Iterator[tuple[Assembly, Target]]:
    qkv = FusedQkv(("q", "k", "v"))
    yield Same("w"), Target("norm", (D,), None)
    yield Projection("w"), Target("mlp.down", (F, D), layer())
    yield Projection("w"), Target("mixer.out", (N, H, D), layer())
    yield Stack(("gate", "up")), Target("mlp.up", (D, 2, F), layer())
    yield Stack(("gate", "up")), Target("mlp.up_bias", (2, F), layer())
    for repeat in (1, 2, 4):
        group = N // K // repeat + 2
        yield qkv, Target("mixer.qkv", (D, K * repeat, group, H), layer(repeat))
        yield qkv, Target("mixer.qkv_bias", (K * repeat, group, H), layer(repeat))


@pytest.mark.parametrize("assembly, target", list(targets()), ids=lambda x: getattr(x, "path", type(x).__name__))
def test_any_slice_is_that_slice_of_the_whole(assembly: Assembly, target: Target) -> None:
    rng = np.random.default_rng(0)
    stored = [rng.standard_normal(shape) for shape in assembly.shapes(target)]
    tensors = [tensor.__getitem__ for tensor in stored]
    whole = assembly.read(tensors, target, tuple(slice(0, size) for size in target.shape))
    assert whole.shape == target.shape
    for _ in range(30):
        bounds = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in target.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        np.testing.assert_array_equal(assembly.read(tensors, target, index), whole[index])


def test_repeated_heads_stand_side_by_side() -> None:
    """Query head n of the checkpoint meets kv head n // G, however often that is repeated."""
    q, k, v = (np.arange(heads)[:, None].repeat(H, 1).reshape(-1) for heads in (N, K, K))
    for repeat in (1, 2, 4):
        group = N // K // repeat
        target = Target("mixer.qkv_bias", (K * repeat, group + 2, H), layer(repeat))
        tensors = [x.__getitem__ for x in (q, k, v)]
        qkv = FusedQkv(("q", "k", "v")).read(tensors, target, tuple(slice(0, size) for size in target.shape))
        for row in qkv[..., 0]:
            assert set(row[:-2] // (N // K)) == {row[-1]} == {row[-2]}
        assert qkv[:, :-2, 0].reshape(-1).tolist() == list(range(N))


def test_a_device_reads_only_its_part() -> None:
    read = []

    def tensor(index: Index) -> np.ndarray:
        read.append(np.empty((64, D))[index].shape)
        return np.empty((64, D))[index]

    half = (slice(0, D), slice(0, 1), slice(0, N // K + 2), slice(0, H))
    FusedQkv(("q", "k", "v")).read([tensor] * 3, Target("mixer.qkv", (D, K, N // K + 2, H), layer()), half)
    assert read == [(N // 2 * H, D), (K // 2 * H, D), (K // 2 * H, D)]


@pytest.mark.parametrize("shape", [(300,), (300, 7), (1, 5), (257, 130)])
def test_transpose(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(jnp.bfloat16)
    assert transpose(x).flags.c_contiguous
    np.testing.assert_array_equal(transpose(x), x.T)


def test_progress_counts_every_parameter(tmp_path: Path) -> None:
    source = open_source(str(cases.write_checkpoint(tmp_path, "llama")))
    model = describe_model(source, dtype=jnp.float32)
    seen: list[tuple[str, int, int]] = []
    load_weights(source, model, sharding_for=one_device, on_progress=lambda *step: seen.append(step))
    assert seen == [("weights", i + 1, len(model.parameters)) for i in range(len(model.parameters))]


def dummy(tmp_path: Path, seed: int) -> dict[str, jax.Array]:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("gemma3_text") | {"hidden_size": 256}))
    source = open_source(str(tmp_path), "dummy")
    model = describe_model(source, dtype=jnp.bfloat16)
    assert source.kind == "dummy"
    weights = load_weights(source, model, sharding_for=one_device, seed=seed)
    assert [(w.shape, w.dtype) for w in weights] == [(a.shape, a.dtype) for a in model.abstract]
    return {p.path: w for p, w in zip(model.parameters, weights, strict=True)}


def test_dummy_weights(tmp_path: Path) -> None:
    weights, again, other = dummy(tmp_path, 0), dummy(tmp_path, 0), dummy(tmp_path, 1)
    assert all((weights[path] == again[path]).all() for path in weights)
    assert not (weights["embed"] == other["embed"]).all()
    assert not (weights["layers.0.mixer.qkv"] == weights["layers.1.mixer.qkv"]).all()
    spread = {path: float(w.astype(jnp.float32).std()) for path, w in weights.items()}
    assert spread["layers.0.mixer.qkv"] == pytest.approx(256**-0.5, rel=0.05)
    assert spread["layers.0.mixer.out"] == pytest.approx((4 * 32) ** -0.5, rel=0.05)
    assert abs(float(weights["final_norm.weight"].mean())) < 0.1  # Gemma's gain is 1 + weight


def test_dummy_takes_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("qwen2")))
    assert open_source(str(tmp_path / "config.json"), "dummy").spec.d_model == 64
