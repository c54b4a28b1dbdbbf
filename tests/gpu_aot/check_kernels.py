"""For an H100 that is not there: attention, matmul and sampling kernels and a small model's step compile for sm_90a; nothing spills.

`make test-gpu-aot`, in an environment of its own: jax's CUDA packages are large, and beside them jax looks for a driver.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.kernels.compile import VARIANTS, build
from jaxserve.build import Build
from jaxserve.compiling import compile_program
from jaxserve.models.layers.mlp import ACTIVATIONS, IN_KERNELS
from jaxserve.pallas_kernels.collectives import all_reduce_normed
from jaxserve.pallas_kernels.drawn_tokens.mosaic_gpu import draw
from jaxserve.pallas_kernels.kept_tokens import Cuts, least_kept
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_rope import rotate_and_write
from jaxserve.pallas_kernels.quantized_rows import mosaic_gpu as quantized_rows
from jaxserve.pallas_kernels.residual_norm.mosaic_gpu import add_and_normalize
from jaxserve.programs import declare_programs
from jaxserve.tpu.target import open_target
from tests.tpu.steps import compile_step, copied_weights, count_collectives, plan, write_config

TARGET = "gpu:h100:1"
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# Few bytes (bench/NOTES.md): heads of 256, 32 query heads for one of keys and values, some with 8-bit pages.
KNOWN = ("h256", "gemma", "mqa", "e4m3 h64", "e4m3 h256", "shared e4m3")


@pytest.fixture(autouse=True)
def ptxas_tells(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ptxas prints what each kernel takes, and nothing comes from a cache."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    jax.config.update("jax_enable_compilation_cache", False)
    yield


def spilled(printed: str) -> list[int]:
    """Bytes that each kernel of ptxas's report stores because registers do not suffice."""
    return [max(int(stores), int(loads)) for stores, loads in _SPILLS.findall(printed)]


@cache
def sharding() -> NamedSharding:
    return NamedSharding(Mesh(np.array(open_target(TARGET).devices), ("x",)), PartitionSpec())


def cases() -> Iterator[Any]:
    for name in VARIANTS:
        yield from (pytest.param(name, kind, id=f"{name}, {kind}") for kind in ("decode", "mixed"))


@pytest.mark.parametrize("name, kind", list(cases()))
def test_no_kernel_spills(name: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    build(sharding(), decode_only=kind == "decode", **VARIANTS[name])
    found = spilled("".join(capfd.readouterr()))
    assert found, "ptxas has said nothing"
    if max(found) and name in KNOWN:
        pytest.xfail(f"known to spill; now {max(found)} bytes")
    assert max(found) == 0


@pytest.mark.parametrize("num_rows", [64, 8192])
@pytest.mark.parametrize("width", [256, 4096, 8960, 11008, 14336, 18944, 28672])
def test_rounding_spills_nothing(width: int, num_rows: int, capfd: pytest.CaptureFixture[str]) -> None:
    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())

    rows, gain = array((num_rows, width)), array((width,))
    gated = array((num_rows, 2, width)), array((num_rows,), jnp.float32), array((2, width), jnp.float32)
    jax.jit(quantized_rows.quantize).lower(rows).compile()
    jax.jit(partial(quantized_rows.quantize_normed, eps=1e-5, offset=0.0)).lower(rows, gain).compile()
    for activation in IN_KERNELS if width == 14336 else ["silu"]:
        jax.jit(partial(quantized_rows.quantize_gated, activation=ACTIVATIONS[activation])).lower(*gated).compile()
    found = spilled("".join(capfd.readouterr()))
    assert len(found) > 2 and max(found) == 0


@pytest.mark.parametrize("parts, num_rows, width", [(8, 64, 4096), (1, 8192, 4096), (8, 64, 8192), (2, 64, 16384)])
def test_sums_with_their_norm_spill_nothing(parts: int, num_rows: int, width: int, capfd: pytest.CaptureFixture[str]) -> None:
    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())

    bf16 = jnp.bfloat16
    plain = (array(num_rows, width, dtype=bf16), array(parts, num_rows, width), array(width, dtype=bf16))
    for arguments, rounds in ((plain, False), ((*plain, array(num_rows), array(width)), True)):
        jax.jit(partial(add_and_normalize, eps=1e-5, offset=0.0, rounds=rounds)).lower(*arguments).compile()
    found = spilled("".join(capfd.readouterr()))
    assert len(found) == 2 and max(found) == 0


@pytest.mark.parametrize(
    "count, num_rows, width", [(1, 256, 4096), (8, 64, 4096), (8, 192, 4096), (4, 128, 8192), (16, 192, 2048)]
)
def test_sums_over_devices_with_their_norm_spill_nothing(
    count: int, num_rows: int, width: int, capfd: pytest.CaptureFixture[str]
) -> None:
    mesh = Mesh(np.array(open_target("gpu:h100:2").devices), ("model",))
    cut, whole = PartitionSpec("model"), PartitionSpec()

    def array(spec: PartitionSpec, *shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def add(parts: Any, residual: Any, gain: Any, table: Any) -> Any:
        return all_reduce_normed(parts, residual, gain, table, "model", eps=1e-5, offset=0.0)

    parts = array(cut, 2 * count, num_rows, width, dtype=jnp.float32 if count > 1 else jnp.bfloat16)
    arguments = parts, array(whole, num_rows, width), array(whole, width), array(cut, 2, 3, 2, dtype=jnp.int32)
    specs = {"mesh": mesh, "in_specs": (cut, whole, whole, cut), "out_specs": whole, "check_vma": False}
    jax.jit(jax.shard_map(add, **specs)).lower(*arguments).compile()
    found = spilled("".join(capfd.readouterr()))
    assert len(found) == 1 and max(found) == 0


@pytest.mark.parametrize("shape", [(64, 8, 6, 128), (8192, 8, 4, 128), (64, 2, 9, 64), (16, 1, 3, 256)], ids=str)
def test_rope_with_page_write_spills_nothing(shape: tuple[int, ...], capfd: pytest.CaptureFixture[str]) -> None:
    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())

    (tokens, num_kv_heads, _, head_dim), bf16 = shape, jnp.bfloat16
    angles, pages = array(tokens, head_dim // 2), array(512, 16, 2 * num_kv_heads, head_dim, dtype=bf16)
    gains, scales = (array(head_dim, dtype=bf16),) * 2, (array(tokens), array(*shape[1:]))
    rest = (angles, angles, pages, array(tokens, dtype=jnp.int32))
    for qkv in (array(*shape, dtype=bf16), array(4, *shape)):
        for more in [(), scales, (None, None, gains), (*scales, gains)]:
            jax.jit(partial(rotate_and_write, eps=1e-5)).lower(qkv, *rest, *more).compile()
    found = spilled("".join(capfd.readouterr()))
    assert len(found) == 8 and max(found) == 0


def test_kernels_round_whatever_an_fp8_step_rounds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = plan(write_config(tmp_path, num_hidden_layers=2), TARGET, quantization="fp8")
    text = compile_step(model, "decode 64").as_text()
    assert max(spilled("".join(capfd.readouterr()))) == 0
    assert_pools_stay(model, text)
    assert not re.search(r"= f8e4m3fn\[[\d,]*\]\S* fusion\(", text)
    assert text.count('"mosaic_gpu_v2"') == 2 * 6, (
        "rope with page write, attention, two norms, attention's output and the activation"
    )


@pytest.mark.parametrize("program", ["decode 16", "decode 256", "decode 64 x 4", "forward 384"])
@pytest.mark.parametrize("options", [{}, {"share_page_reads": False}], ids=["shared", "plain"])
def test_a_step_runs_kernels_and_spills_nothing(
    program: str, options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = plan(write_config(tmp_path, num_hidden_layers=3), TARGET, **options)
    compiled = compile_step(model, program)
    found = spilled("".join(capfd.readouterr()))
    assert found and max(found) == 0
    text = compiled.as_text()
    assert "paged_decode" in text or "mosaic_gpu" in text
    assert ".remat" not in text, "small arrays are computed anew for each layer"
    assert compiled.memory_analysis().alias_size_in_bytes >= model.num_pages * model.page_bytes, (
        "the pool is not updated in place"
    )
    assert_pools_stay(model, text)


def assert_pools_stay(model: Build, text: str) -> None:
    for cache_ in model.inputs().state.caches:
        assert not re.search(rf"\[{','.join(map(str, cache_.shape))}\]\S* copy\(", text), "a pool is copied"


@pytest.mark.parametrize("vocab", [600, 50257, 128256, 262144])
def test_thresholds_spill_nothing(vocab: int, capfd: pytest.CaptureFixture[str]) -> None:
    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())

    def find(logits: jax.Array, top_k: jax.Array, x: jax.Array) -> jax.Array:
        return least_kept(logits, Cuts(x, top_k, x, x), "mosaic_gpu")

    jax.jit(find).lower(array(64, vocab), array(64, dtype=jnp.int32), array(64)).compile()
    found = spilled("".join(capfd.readouterr()))
    assert found and max(found) == 0


@pytest.mark.parametrize("vocab", [600, 50257, 128256, 262144])
def test_draws_spill_nothing(vocab: int, capfd: pytest.CaptureFixture[str]) -> None:
    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())

    floats = array(64, vocab, dtype=jnp.float32), array(64, dtype=jnp.float32)
    jax.jit(draw).lower(*floats, array(64), array(64, dtype=jnp.bool_), array(64, 2)).compile()
    found = spilled("".join(capfd.readouterr()))
    assert found and max(found) == 0


@pytest.mark.parametrize("devices", [1, 2])
def test_every_sample_program_runs_its_kernels(devices: int, tmp_path: Path) -> None:
    """Each device its own copy, of all rows: nothing is exchanged."""
    model = plan(write_config(tmp_path, num_hidden_layers=1), f"gpu:h100:{devices}", devices)
    programs = [p for p in declare_programs(model.inputs(), model.model.apply, model.runtime) if p.name.startswith("sample")]
    assert [p.name for p in programs] == ["sample 16 full", "sample 64 full", "sample 256 full", "sample logprobs"]
    for program in programs[-2:]:
        text = compile_program(program, model.runtime)[0].as_text()
        assert text.count('custom_call_target="mosaic_gpu') == 2
        assert not count_collectives(text)


@pytest.mark.parametrize(
    ("name", "program", "kernels"),
    [
        ("qwen3-30b-a3b", "decode 16", ["choose_experts", "expert_products", "paged_decode"]),
        ("deepseek-v2-lite", "decode 16", ["choose_experts", "expert_products", "latent_decode"]),
        ("deepseek-v2-lite", "forward 384", ["latent_decode", "latent_prefill"]),
        ("falcon-h1-7b", "decode 64", ["decayed_state", "paged_decode"]),
    ],
)
def test_layers_of_real_size_run_their_kernels(name: str, program: str, kernels: list[str], tmp_path: Path) -> None:
    """Two of them, and neither pages nor states are copied."""
    model = plan(write_config(tmp_path, name, num_hidden_layers=2), TARGET)
    text = compile_step(model, program).as_text()
    assert [kernel for kernel in kernels if f"/{kernel}/" not in text] == []
    for cache_ in model.inputs().state.caches:
        assert not re.search(rf"\[{','.join(map(str, cache_.shape))}\]\S* copy\(", text), "pages or states are copied"


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_two_devices_add_up_by_themselves(quantization: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twice a layer and once for the embeddings, and gather the logits. What is too large for a slot is left to XLA.

    All sums but those of the embeddings and of the last layer are normed in the same kernel.
    """
    model = plan(write_config(tmp_path, num_hidden_layers=3), "gpu:h100:2", 2, quantization=quantization)
    text = compile_step(model, "decode 64").as_text()
    found = spilled("".join(capfd.readouterr()))
    assert found and max(found) == 0
    assert not count_collectives(text)
    assert len(re.findall(r"custom-call\(.*all_reduce_norm_kernel", text)) == 2 * 3 - 1
    assert len(re.findall(r"custom-call\(.*all_reduce_kernel", text)) == 2
    assert not copied_weights(model, text)
    assert len(re.findall(r"custom-call\(.*all_gather_kernel", text)) == 1
    many = count_collectives(compile_step(model, "forward 8192").as_text())
    assert many.get("all-reduce", 0) == 2 * 3 + 1


def test_two_devices_leave_adding_up_to_xla_if_asked(tmp_path: Path) -> None:
    """It takes all-reduce kernels of its own, which no graph can hold."""
    model = plan(write_config(tmp_path, num_hidden_layers=3), "gpu:h100:2", 2, peer_sums=False)
    text = compile_step(model, "decode 64").as_text()
    assert count_collectives(text) == {"all-reduce": 2 * 3 + 1, "all-gather": 1}
    assert "KERNEL_STRATEGY_TRITON" in text
