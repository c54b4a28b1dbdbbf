"""Matmul of few rows: who computes what, and its numbers, in the interpreter here and on an NVIDIA GPU (pytest -m gpu)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.layers.linear import linear, matmuls_by
from jaxserve.models.layers.quantized import Fp8Weight, quantize_fp8
from jaxserve.models.loading import open_source
from jaxserve.pallas_kernels.skinny_matmul import mosaic_gpu
from jaxserve.sharding import make_mesh
from jaxserve.startup import plan_build
from tests.tpu.steps import write_config

MULTIPLY = gpu_callbacks.wgmma


def multiply_values(**arguments: Any) -> Any:
    """The interpreter's wgmma, which has only known operands in shared memory; this one also takes a left one in registers."""
    a = arguments["a_allocation_key_as_array"]
    if a.ndim == 1:
        return MULTIPLY(**arguments)
    memory, thread = gpu_callbacks._get_shared_memory(), arguments["thread"]
    info = gpu_callbacks.memory.GPULoggingInfo(arguments["mesh_location"], thread, arguments["source_info"])

    def place(name: str) -> tuple[Any, Any]:
        key = gpu_callbacks.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
        transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{name}_transforms"])
        return key, memory.access(key, jax.tree.map(int, transforms))

    acc, b = (memory.get_buffer_content(*place(name), thread, logging_info=info)[0] for name in ("acc", "b"))
    total = acc + np.matmul(np.asarray(a), b, dtype=acc.dtype)
    memory.store_buffer_content(*place("acc"), total, thread, logging_info=info)
    return arguments["token"]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Kernels run in the interpreter: one thread block after the other, so that none has to wait for those before it.

    What it takes for races is then what waiting puts in order, and nothing else: a block reads what others have summed.
    """
    monkeypatch.setattr(mosaic_gpu, "signal", lambda *_: None)
    monkeypatch.setattr(mosaic_gpu, "wait", lambda *_: None)
    monkeypatch.setattr(gpu_callbacks, "wgmma", multiply_values)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    races = "".join(capfd.readouterr()).split("RACE DETECTED")[1:]
    assert bool(races) == gpu_callbacks.get_races().races_found
    assert all(".add)" in race.splitlines()[1] for race in races), races


def case(kind: str, rows: int, depth: int, cols: int) -> tuple[jax.Array, jax.Array | Fp8Weight, jax.Array]:
    """Rows, weights as a layer holds them, and the product in float32."""
    rng = np.random.default_rng([rows, depth, cols])
    x = jnp.asarray(rng.standard_normal((rows, depth)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((depth, cols)), jnp.bfloat16)
    if kind == "fp8":
        held = quantize_fp8(w * jnp.arange(1, cols + 1, dtype=jnp.float32), contract=1)
        w = (held.values.astype(jnp.float32) * held.scales[:, None]).T
        return x, held, product(x, w)
    return x, w.T if kind == "tied" else w, product(x, w)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")


def assert_equal_but_for_rounding(out: jax.Array, want: jax.Array) -> None:
    scale = np.std(np.asarray(want), axis=0)
    bits = 8 if out.dtype == jnp.bfloat16 else 18
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float32) - want) / scale, 4 * 2.0**-bits)


@pytest.mark.parametrize(
    ("ctas", "tiles", "pieces"), [(132, 48, 64), (132, 32, 224), (132, 1187, 16), (132, 8, 48), (5, 2, 4), (7, 7, 1)]
)
def test_each_piece_is_summed_once(ctas: int, tiles: int, pieces: int) -> None:
    body = mosaic_gpu._Body(config=None, ctas=ctas, tiles=tiles, pieces=pieces, rows=8, inputs_last=True)  # type: ignore[arg-type]
    starts = np.asarray(body.first_piece(jnp.arange(ctas + 1)))
    assert starts[0] == 0 and starts[-1] == tiles * pieces
    runs = np.diff(starts)
    assert runs.min() >= 1 and runs.max() - runs.min() <= 1
    owner = np.repeat(np.arange(ctas), runs)  # of each piece
    openers = np.asarray(body.opener(jnp.arange(tiles)))
    assert (openers == owner[::pieces]).all()
    # What a block leaves to another is of one tile: that of the last piece it has.
    left = [cta for cta in range(ctas) if starts[cta + 1] % pieces]
    awaited = [cta for tile in range(tiles) for cta in range(openers[tile], owner[(tile + 1) * pieces - 1])]
    assert left == awaited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ctas", "rows", "depth", "cols"),
    [
        ("plain", 3, 12, 256, 256),
        ("fp8", 3, 8, 384, 128),
        pytest.param("tied", 2, 8, 64, 384, marks=pytest.mark.extra),
        pytest.param("fp8", 2, 40, 384, 256, marks=pytest.mark.extra),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_kernel_in_the_interpreter(
    kind: str, ctas: int, rows: int, depth: int, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_gpu, "count_blocks", lambda tiles, pieces: ctas)
    x, w, want = case(kind, rows, depth, cols)
    with matmuls_by("mosaic_gpu"):
        out = linear(x, w, transpose=kind == "tied", out_dtype=jnp.float32 if kind == "tied" else None)
    assert_equal_but_for_rounding(out, want)


@pytest.mark.parametrize(("rows", "depth", "cols"), [(129, 256, 256), (8, 96, 256), (8, 256, 192)])
def test_what_the_kernel_does_not_serve_is_left_to_xla(rows: int, depth: int, cols: int) -> None:
    x, w, want = case("plain", rows, depth, cols)
    with matmuls_by("mosaic_gpu"):
        assert_equal_but_for_rounding(linear(x, w), want)
        assert "mosaic" not in str(jax.make_jaxpr(linear)(x, w))


def test_devices_without_the_kernel_refuse_the_option(tmp_path: Path) -> None:
    config = EngineConfig.from_options(model=write_config(tmp_path), load_format="dummy", matmul_kernel="mosaic_gpu")
    with pytest.raises(ConfigError, match="one H100 or H200.*got 1 x cpu"):
        plan_build(config, open_source(config.model.model, "dummy"), make_mesh(1))


SHAPES = [(4096, 6144), (14336, 4096), (1024, 128), (3072, 1024), (2048, 151936), (896, 9728), (128, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "tied", "fp8"])
@pytest.mark.parametrize(("depth", "cols"), SHAPES)
def test_kernel_on_the_gpu(kind: str, depth: int, cols: int) -> None:
    for rows in (1, 16, 37, 64, 128):
        x, w, want = case(kind, rows, depth, cols)
        for out_dtype in (jnp.bfloat16, jnp.float32):
            with matmuls_by("mosaic_gpu"):
                multiply = jax.jit(lambda x, w, dtype=out_dtype: linear(x, w, transpose=kind == "tied", out_dtype=dtype))
                outs = [np.asarray(multiply(x, w), np.float32) for _ in range(20)]
            assert_equal_but_for_rounding(multiply(x, w), want)
            assert all((out == outs[0]).all() for out in outs), "two runs differ"
