"""Placing weights: slices for shards, progress, dummies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.families.assembly import Assembly, Halves, Index, Projection, Same, Stack, Target, memory_order, stack
from jaxserve.models.families.moe_assembly import ExpertDown, ExpertUp, FusedDown, FusedUp, StackedRows
from jaxserve.models.families.qkv_assembly import HeadNorm, LatentUp, Qkv
from jaxserve.models.layers.quantized import put_inputs_last
from jaxserve.models.loading import describe_model, load_weights, open_source
from jaxserve.models.loading.placing import turned_on_device, turned_on_host
from jaxserve.models.spec import AttentionSpec, LayerSpec, MlaSpec, MlpSpec, MoeSpec, NormSpec, RopeSpec, RouterSpec
from jaxserve.sharding import Shardings, make_mesh
from tests.goldens import cases
from tests.models.forward import one_device

D, F, N, K, H = 12, 8, 8, 2, 4
E, R, NOPE, V = 3, 6, 5, 7


def layer(kv_repeat: int = 1, kv_heads: int = K) -> LayerSpec:
    mixer = AttentionSpec(num_heads=N, num_kv_heads=kv_heads, head_dim=H, scale=1.0, rope=None, kv_repeat=kv_repeat)
    return LayerSpec(mixer=mixer, mlp=MlpSpec(dim=F, activation="silu"))


def moe_layer() -> LayerSpec:
    expert = MlpSpec(dim=F, activation="silu")
    return LayerSpec(mixer=None, mlp=MoeSpec(num_experts=E, top_k=1, expert=expert, router=RouterSpec()))


def mla_layer() -> LayerSpec:
    sizes = {"num_heads": N, "q_rank": None, "kv_rank": R, "nope_dim": NOPE, "rope_dim": 2, "v_dim": V}
    rope = RopeSpec(theta=1e4, rotary_dim=2)
    return LayerSpec(mixer=MlaSpec(**sizes, scale=1.0, rope=rope, latent_norm=NormSpec(eps=1e-6)), mlp=None)


def expert_targets() -> Iterator[tuple[Assembly, Target]]:
    """Every form of experts that a checkpoint may have."""
    up, down = Target("mlp.experts_up", (E, D, 2 * F), moe_layer()), Target("mlp.experts_down", (E, F, D), moe_layer())
    bias = Target("mlp.experts_up_bias", (E, 2 * F), moe_layer())
    yield ExpertUp(("gate.{e}", "up.{e}")), up
    yield ExpertDown("down.{e}"), down
    for layout in ("linear", "halves", "interleaved"):
        yield FusedUp("up", layout), up
        yield FusedUp("up", layout), bias
    yield FusedDown("down", True), down
    yield FusedDown("down", False), down
    yield StackedRows(("gate", "up")), up
    yield StackedRows(("down",)), down


def targets() -> Iterator[tuple[Assembly, Target]]:
    qkv = Qkv(("q", "k", "v"))
    yield Same("w"), Target("norm", (D,), None)
    yield Projection("w"), Target("mlp.down", (F, D), layer())
    yield Projection("w"), Target("mixer.out", (N, H, D), layer())
    yield Stack(("gate", "up")), Target("mlp.up", (D, 2, F), layer())
    yield Stack(("gate", "up")), Target("mlp.up_bias", (2, F), layer())
    yield Stack(("up",), is_transposed=True), Target("mlp.up", (D, 1, F), layer())
    yield Halves("gate_up"), Target("mlp.up", (D, 2, F), layer())
    yield Halves("up_gate", is_swapped=True), Target("mlp.up", (D, 2, F), layer())
    yield Projection("w", num_inputs=1), Target("mixer.gate", (D, N, H), layer())
    yield Projection("w", is_transposed=True), Target("mixer.out", (N, H, D), layer())
    yield LatentUp("w", "keys"), Target("mixer.k_up", (N, NOPE, R), mla_layer())
    yield LatentUp("w", "values"), Target("mixer.v_up", (N, R, V), mla_layer())
    yield from expert_targets()
    for layout in ("concatenated", "grouped", "codegen"):
        for transposed in (False, True):
            yield Qkv(("qkv",), layout, transposed), Target("mixer.qkv", (D, N, 3, H), layer(kv_heads=N))
    for form in ("heads", "flat", "apart"):
        yield HeadNorm("norm.{h}", form), Target("mixer.k_norm.weight", (K * 2, H), layer(2))
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
        qkv = Qkv(("q", "k", "v")).read(tensors, target, tuple(slice(0, size) for size in target.shape))
        for row in qkv[..., 0]:
            assert set(row[:-2] // (N // K)) == {row[-1]} == {row[-2]}
        assert qkv[:, :-2, 0].reshape(-1).tolist() == list(range(N))


def test_a_device_reads_only_its_part() -> None:
    read = []

    def tensor(index: Index) -> np.ndarray:
        read.append(np.empty((64, D))[index].shape)
        return np.empty((64, D))[index]

    half = (slice(0, D), slice(0, 1), slice(0, N // K + 2), slice(0, H))
    Qkv(("q", "k", "v")).read([tensor] * 3, Target("mixer.qkv", (D, K, N // K + 2, H), layer()), half)
    assert read == [(N // 2 * H, D), (K // 2 * H, D), (K // 2 * H, D)]


PARTS = {
    "vector": np.arange(300.0),
    "scalar": np.array(3.0),
    "as it is": np.arange(300.0 * 7).reshape(300, 7),
    "turned over": np.arange(257.0 * 130).reshape(257, 130).T,
    "heads": np.moveaxis(np.arange(3.0 * 4 * 5 * 20).reshape(3, 4, 5, 20), -1, 0),
    "inputs of many axes": np.arange(300.0 * 24).reshape(300, 6, 4).transpose(1, 2, 0),
    "experts": np.moveaxis(np.arange(2.0 * 2 * 9 * 8).reshape(2, 2, 9, 8), -1, 1),
    "cut": np.arange(400.0 * 50).reshape(400, 50)[:, 10:30].T,
    "empty": np.zeros((0, 4)),
}


@pytest.mark.parametrize("dtype, wanted", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("name", PARTS)
def test_parts_are_turned_over_alike_on_host_and_device(name: str, dtype: str, wanted: str) -> None:
    part = PARTS[name].astype(dtype, order="K")
    expected = part.astype(wanted)
    on_host = turned_on_host(part, jnp.dtype(wanted))
    assert on_host.flags.c_contiguous and on_host.dtype == wanted
    np.testing.assert_array_equal(on_host, expected)
    on_device = turned_on_device(part, jax.devices()[0], jnp.dtype(wanted))
    assert on_device.dtype == wanted
    np.testing.assert_array_equal(on_device, expected)


def test_stack_keeps_the_order_of_memory() -> None:
    parts = [np.random.default_rng(i).standard_normal((4, 5, 6)).transpose(2, 0, 1) for i in range(3)]
    for axis in (0, 1, -2, -1):
        stacked = stack(parts, axis)
        np.testing.assert_array_equal(stacked, np.stack(parts, axis))
        assert [stacked.shape[i] for i in memory_order(stacked)] == [3, 4, 5, 6]


@pytest.mark.parametrize("case, devices", [("llama", 1), ("gpt2", 2), ("mixtral", 2)])
def test_outputs_first_is_plain_turned(case: str, devices: int, tmp_path: Path) -> None:
    """Checkpoints of both orders, and experts, which are never turned."""
    source = open_source(str(cases.write_checkpoint(tmp_path, case)))
    sharding_for = Shardings(make_mesh(devices)).of
    plain, turned = (describe_model(source, dtype=jnp.bfloat16, outputs_first=is_so) for is_so in (False, True))
    read = load_weights(source, turned, sharding_for=sharding_for)
    for parameter, want, got in zip(turned.parameters, load_weights(source, plain, sharding_for=sharding_for), read, strict=True):
        ((abstract, axes),) = parameter.arrays
        assert got.shape == abstract.shape and got.sharding == sharding_for(axes, got.shape), parameter.path
        np.testing.assert_array_equal(got, put_inputs_last(want, parameter.turned), err_msg=parameter.path)
    assert {"outputs_first", "plain"} == {parameter.form for parameter in turned.parameters}


def test_progress_counts_every_parameter(tmp_path: Path) -> None:
    source = open_source(str(cases.write_checkpoint(tmp_path, "llama")))
    model = describe_model(source, dtype=jnp.float32)
    seen: list[tuple[str, int, int]] = []
    load_weights(source, model, sharding_for=one_device, on_progress=lambda *step: seen.append(step))
    assert seen == [("weights", i + 1, len(model.parameters)) for i in range(len(model.parameters))]


def dummy(tmp_path: Path, seed: int, outputs_first: bool = False) -> dict[str, jax.Array]:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("gemma3_text") | {"hidden_size": 256}))
    source = open_source(str(tmp_path), "dummy")
    model = describe_model(source, dtype=jnp.bfloat16, outputs_first=outputs_first)
    assert source.kind == "dummy"
    weights = load_weights(source, model, sharding_for=one_device, seed=seed)
    assert [(w.shape, w.dtype) for w in weights] == [(a.shape, a.dtype) for a in model.abstract]
    return {p.path: w for p, w in zip(model.parameters, weights, strict=True)}


@pytest.mark.slow
def test_dummy_weights(tmp_path: Path) -> None:
    weights, again, other = dummy(tmp_path, 0), dummy(tmp_path, 0), dummy(tmp_path, 1)
    assert all((weights[path] == again[path]).all() for path in weights)
    assert not (weights["embed"] == other["embed"]).all()
    assert not (weights["layers.0.mixer.qkv"] == weights["layers.1.mixer.qkv"]).all()
    turned = dummy(tmp_path, 0, outputs_first=True)["layers.0.mixer.qkv"]
    np.testing.assert_array_equal(turned, put_inputs_last(weights["layers.0.mixer.qkv"], 1))
    spread = {path: float(w.astype(jnp.float32).std()) for path, w in weights.items()}
    assert spread["layers.0.mixer.qkv"] == pytest.approx(256**-0.5, rel=0.05)
    assert spread["layers.0.mixer.out"] == pytest.approx((4 * 32) ** -0.5, rel=0.05)
    assert abs(float(weights["final_norm.weight"].mean())) < 0.1  # Gemma's gain is 1 + weight


def test_dummy_takes_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.read_config("qwen2")))
    assert open_source(str(tmp_path / "config.json"), "dummy").spec.d_model == 64
