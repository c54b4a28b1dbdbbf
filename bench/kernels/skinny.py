"""Times matmuls of few rows on one GPU, XLA's beside the kernel's: PYTHONPATH=. python bench/kernels/skinny.py [--out FILE].

A program multiplies by as many different matrices of one shape as the caches cannot hold, as a step does; its time is the
device's with launches. One line a shape: TB/s of weights, and microseconds a matmul; after the shapes of a model, what its
matmuls take in a step. What does not fit into --seconds is named and left out: the first lines are the ones most wanted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.layers.linear import linear
from jaxserve.models.layers.quantized import FP8, Fp8Weight
from jaxserve.pallas_kernels.skinny_matmul import mosaic_gpu

MODELS = {  # layers; inputs, output features of each matmul of a layer; of the logits, and whether that is the embedding
    "llama-3.1-8b": (32, {"qkv": (4096, 6144), "out": (4096, 4096), "up": (4096, 28672), "down": (14336, 4096)}, (4096, 128256, False)),
    "qwen3-0.6b": (28, {"qkv": (1024, 4096), "out": (2048, 1024), "up": (1024, 6144), "down": (3072, 1024)}, (1024, 151936, True)),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {  # XLA's options
    "xla": {},
    "triton": {"xla_gpu_triton_gemm_any": True},
    "cublas": {"xla_gpu_enable_triton_gemm": False},
}
BYTES = 256 * 2**20  # of weights in a program: five times an H100's L2 cache


def matrix(shape: tuple[int, ...], held: str, seed: int) -> jax.Array | Fp8Weight:
    """Weights as a layer holds them: [in, out]; the embedding, and 8 bits, [out, in]."""
    depth, cols = shape
    small = jax.random.normal(jax.random.key(seed), (depth, cols) if held == "plain" else (cols, depth), jnp.bfloat16)
    return Fp8Weight(small.astype(FP8), jnp.full(cols, depth**-0.5)) if held == "fp8" else small * depth**-0.5


def multiply(xs: list[jax.Array], ws: list[Any], *, held: str, out_dtype: Any) -> list[jax.Array]:
    """Rows of their own for each matrix: XLA would round equal ones once."""
    one = jax.jit(partial(linear, transpose=held == "tied", out_dtype=out_dtype))
    return [one(x, w) for x, w in zip(xs, ws, strict=True)]


def by_kernel(xs: list[jax.Array], ws: list[Any], *, tile: int | None, held: str, out_dtype: Any) -> list[jax.Array]:
    """The kernel, whatever rows it is used for; with tiles of that width instead of the rule's."""

    @jax.jit
    def one(x: jax.Array, w: Any) -> jax.Array:
        values, scales = (w.values, w.scales) if held == "fp8" else (w, None)
        return mosaic_gpu.skinny_matmul(x, values, scales, inputs_last=held != "plain", out_dtype=out_dtype, tile=tile)

    return [one(x, w) for x, w in zip(xs, ws, strict=True)]


def seconds(program: Any, xs: list[jax.Array], ws: list[Any]) -> float:
    """Of one matmul: enough runs back to back that dispatch hides behind the device."""
    for _ in range(2):
        jax.block_until_ready(program(xs, ws))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        outs = [program(xs, ws) for _ in range(4)]
        jax.block_until_ready(outs)
        times.append((time.perf_counter() - start) / (4 * len(xs)))
    return min(times)


def error(out: jax.Array, x: jax.Array, w: Any, held: str) -> float:
    """Relative, to the product in float32 of the weights as they are."""
    wide = w.values.astype(jnp.float32).T * w.scales if held == "fp8" else (w.T if held == "tied" else w).astype(jnp.float32)
    want = jnp.matmul(x.astype(jnp.float32), wide, precision="highest")
    return float(jnp.linalg.norm(out.astype(jnp.float32) - want) / jnp.linalg.norm(want))


def measure(shape: tuple[int, int], rows: int, held: str, ways: list[str], has_kernel: bool) -> dict[str, Any]:
    """Each way's microseconds and TB/s of weights, and what is wrong with the kernel's numbers."""
    size = shape[0] * shape[1] * (1 if held == "fp8" else 2)
    count = max(2, min(48, -(-BYTES // size)))
    ws = [matrix(shape, held, 0)]
    ws += [jax.tree.map(jnp.copy, ws[0]) for _ in range(count - 1)]
    xs = [jax.random.normal(jax.random.key(i), (rows, shape[0]), jnp.bfloat16) for i in range(count)]
    options = {"held": held, "out_dtype": jnp.float32 if held == "tied" or shape[1] > 100_000 else jnp.bfloat16}
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        way: (partial(multiply, **options), WAYS[way]) for way in ways if way in WAYS
    }
    if has_kernel:
        calls["kernel"] = partial(by_kernel, tile=None, **options), {}
        tiles = [int(way) for way in ways if way.isdecimal()]
        calls |= {f"kernel {tile}": (partial(by_kernel, tile=tile, **options), {}) for tile in tiles}

    def compile_one(way: str) -> Any:
        call, compiler_options = calls[way]
        return jax.jit(call).lower(xs, ws).compile(compiler_options)

    found: dict[str, Any] = {}
    with ThreadPoolExecutor(4) as pool:
        futures = {way: pool.submit(compile_one, way) for way in calls}
    for way, future in futures.items():
        try:
            program = future.result()
            took = seconds(program, xs, ws)
            found[way] = {"us": round(took * 1e6, 1), "TB/s": round(size / took / 1e12, 2)}
            if way.startswith("kernel"):
                outs = [program(xs, ws)[-1] for _ in range(10)]
                found[way]["error"] = round(error(outs[0], xs[-1], ws[-1], held), 5)
                found[way]["repeats"] = all(bool((out == outs[0]).all()) for out in outs)
        except Exception as e:  # noqa: BLE001  the other ways are still wanted
            found[way] = {"failed": f"{type(e).__name__}: {str(e)[:200]}"}
    return found


def jobs(models: list[str], rows: list[int], kinds: list[str]) -> Iterator[tuple[str, str, int]]:
    yield from ((model, kind, count) for model in models for count in rows for kind in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 16, 128, 1, 256])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--kinds", nargs="*", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument(
        "--ways",
        nargs="*",
        default=["xla", "triton"],
        choices=[*WAYS, "128", "256"],
        help="beside the kernel; a number: its tiles' width",
    )
    parser.add_argument("--seconds", type=float, default=110, help="begin nothing new after so long")
    parser.add_argument("--divide", type=int, default=1, help="sizes by this, to try the script out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()  # fmt: skip
    device, begin = jax.devices()[0], time.perf_counter()
    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "matmuls": []}
    left = []
    for model, kind, rows in jobs(args.models, args.rows, args.kinds):
        layers, shapes, (width, vocab, is_tied) = MODELS[model]
        step: dict[str, float] = {}
        for name, shape in (*shapes.items(), ("logits", (width, vocab))):
            if name == "logits" and kind == "fp8":
                continue  # never of 8 bits
            if time.perf_counter() - begin > args.seconds:
                left.append(f"{model} {kind} {rows} {name}")
                continue
            held = "fp8" if kind == "fp8" else "tied" if name == "logits" and is_tied else "plain"
            small = shape[0] // args.divide, shape[1] // args.divide
            found = measure(small, rows, held, args.ways, device.platform == "gpu")
            figures["matmuls"].append({"model": model, "kind": kind, "rows": rows, "name": name, "shape": small, **found})
            print(f"{model} {kind} {rows:3} rows {name:6}", *(f"| {way} {_line(x)}" for way, x in found.items()), flush=True)
            for way, x in found.items():
                step[way] = step.get(way, 0) + x.get("us", np.nan) * (1 if name == "logits" else layers) / 1e3
            if args.out:
                args.out.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"  {model} {kind} {rows} rows, ms a step:", {way: round(ms, 2) for way, ms in step.items()}, flush=True)
    if left:
        print("not measured, for want of time:", *left, sep="\n  ")


def _line(x: dict[str, Any]) -> str:
    if "failed" in x:
        return x["failed"]
    wrong = [] if x.get("error", 0) < 0.01 else [f"ERROR {x['error']}"]
    wrong += [] if x.get("repeats", True) else ["RUNS DIFFER"]
    return " ".join([f"{x['TB/s']:.2f} TB/s {x['us']:7.1f} us", *wrong])


if __name__ == "__main__":
    main()
