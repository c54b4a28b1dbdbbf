"""Times rounding to 8 bits on one GPU: PYTHONPATH=. python bench/kernels/quantized_rows.py [--out FILE].

What stands between the matmuls of an fp8 layer: attention's output rounded, a norm rounded, a gated activation rounded; the kernels in
every size of thread block, and XLA's own fusions of the same. Microseconds an operation, of many in one CUDA graph, so with what a
launch costs there; `differ` is the share of values unlike the reference's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.quantized_rows import mosaic_gpu, reference
from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu import Config

Operation = Callable[..., Any]


def xla_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values, and the largest of each row: what it is divided by is computed where it is used."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    return (wide / reference.scale_of(largest)[:, None]).astype(reference.E4M3), largest


def xla_normed(x: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    return xla_rows(wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5) * gain.astype(jnp.float32))


def xla_gated(up: jax.Array, row_scales: jax.Array, scales: jax.Array) -> Any:
    """As a layer without kernels computes it."""
    dense = (up.astype(jnp.float32) * row_scales[:, None, None] * scales).astype(up.dtype)
    return xla_rows(jax.nn.silu(dense[:, 0]) * dense[:, 1])


def inputs_of(name: str, rows: int, width: int) -> tuple[jax.Array, ...]:
    """The rows, and what else the operation takes."""
    keys = jax.random.split(jax.random.key(rows), 3)
    if name != "gated":
        x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
        return (x,) if name == "rows" else (x, jax.random.normal(keys[1], (width,), jnp.bfloat16))
    up = 100 * jax.random.normal(keys[0], (rows, 2, width), jnp.bfloat16)
    scales = (jax.random.uniform(k, shape, minval=0.05, maxval=0.2) for k, shape in ((keys[1], (rows,)), (keys[2], (2, width))))
    return (up, *scales)


def operations(width: int, ffn: int) -> dict[str, tuple[int, Operation, Operation, Operation, dict[str, Config | None]]]:
    """Name -> width, reference, XLA's, the kernel, and its sizes to try."""
    norm = {"eps": 1e-5, "offset": 0.0}
    gated = partial(reference.quantize_gated, activation=jax.nn.silu), xla_gated
    gated_kernel = partial(mosaic_gpu.quantize_gated, activation=jax.nn.silu)
    tried = {f"{w} x {v}, {r}": Config(w, v, r) for w, v, r in ((4, 4, 1), (4, 4, 2), (8, 2, 1), (8, 2, 2))}
    narrow = {f"{w} x {v}": Config(w, v, 1) for w, v in ((2, 4), (1, 8), (2, 8))}
    normed = partial(reference.quantize_normed, **norm)
    return {
        "gated": (ffn, *gated, gated_kernel, {"": None} | tried),
        "rows": (width, reference.quantize, xla_rows, mosaic_gpu.quantize, {"": None} | narrow),
        "norm": (width, normed, xla_normed, partial(mosaic_gpu.quantize_normed, **norm), {"": None}),
    }


def repeated(operation: Operation, count: int) -> Operation:
    """`count` of it in one program, one after the other, each result stored."""
    operation = jax.jit(operation)

    def run(rows: jax.Array, *rest: jax.Array) -> list[Any]:
        results: list[Any] = []
        for _ in range(count):
            rows, *last = jax.lax.optimization_barrier((rows, *results[-1:]))
            results[-1:] = last
            results.append(jax.lax.optimization_barrier(operation(rows, *rest)))
        return results

    return run


def microseconds(program: Any, arguments: tuple[jax.Array, ...], count: int) -> float:
    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            results = program(*arguments)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls / count * 1e6

    timed(3)
    return round(min(timed(5) for _ in range(4)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 8192])
    parser.add_argument("--widths", type=int, nargs=2, default=[4096, 14336], help="of the model and of its ffn")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[64, 8192], help="rows at which every size of thread block is tried"
    )
    parser.add_argument(
        "--interpret", action="store_true", help="run the kernels in Pallas' interpreter, to try this out on a CPU"
    )
    parser.add_argument("--seconds", type=float, default=40, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin, device = time.perf_counter(), jax.devices()[0]
    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "widths": args.widths, "us": {}}
    pool, cases = ThreadPoolExecutor(12), []
    for name, (width, check, xla, kernel, configs) in operations(*args.widths).items():
        for rows in args.rows:
            arguments = inputs_of(name, rows, width)
            count = 2 if args.interpret else 32 if rows <= 256 else 4
            want = pool.submit(jax.jit(check), *arguments)
            sizes = configs if rows in args.sizes else {"": None}
            ways = {"xla": xla} | {f"kernel {size}".strip(): partial(kernel, config=sizes[size]) for size in sizes}
            for way, operation in ways.items():
                with plgpu.force_gpu_interpret_mode() if args.interpret else nullcontext():
                    lowered = jax.jit(repeated(operation, count)).lower(*arguments)
                cases.append((f"{name}, {rows} rows, {way}", pool.submit(lowered.compile), arguments, count, want))
    for label, program, arguments, count, want in cases:
        if time.perf_counter() - begin > args.seconds:
            figures["us"][label] = "left out for want of time"
            continue
        try:
            compiled = program.result()
            values, scales = compiled(*arguments)[-1]
            wanted, wanted_scales = want.result()
            differ = float(jnp.mean(values.view(jnp.uint8) != wanted.view(jnp.uint8)))
            off = float(jnp.max(jnp.abs((reference.scale_of(scales) if label.endswith("xla") else scales) / wanted_scales - 1)))
            us = microseconds(compiled, arguments, count)
            moved = sum(x.size * x.dtype.itemsize for x in (*arguments, values, scales))
            figures["us"][label] = {"us": us, "GB/s": round(moved / us / 1e3), "differ": differ, "scales off": off}
        except Exception as error:  # noqa: BLE001  the others are still wanted
            figures["us"][label] = f"{type(error).__name__}: {str(error)[:150]}"
        print(f"{label:36}", figures["us"][label], flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n")
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
