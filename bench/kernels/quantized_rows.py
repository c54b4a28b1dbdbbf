"""Times rounding to 8 bits on one GPU: PYTHONPATH=. python bench/kernels/quantized_rows.py [--out FILE].

What stands between the matmuls of an fp8 layer: attention's output rounded, a norm rounded, a gated activation rounded, and, for
bfloat16 too, rope with the page write; the kernels in every size of thread block, and XLA's own fusions of the same. Microseconds an
operation, of many in one CUDA graph, so with what a launch costs there; `differ` is the share of values unlike the reference's.
On a CPU the fusions alone run, to try this out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.layers.rope import rotate
from jaxserve.pallas_kernels.paged_attention import Implementation, mosaic_gpu_rope, rotate_and_write, write_kv
from jaxserve.pallas_kernels.quantized_rows import mosaic_gpu, reference
from jaxserve.pallas_kernels.quantized_rows.mosaic_gpu_team import Config

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
    if name.startswith("rope"):
        heads, half = (rows, 8, 6, width // 32), width // 64
        angles = jax.random.uniform(keys[0], (rows, half), maxval=6)
        pages = jnp.zeros((2 * -(-rows // 16), 16, 16, width // 32), jnp.bfloat16)
        slots = jax.random.permutation(keys[1], pages.shape[0] * 16)[:rows]
        found = jax.random.normal(keys[2], heads, jnp.bfloat16), jnp.cos(angles), jnp.sin(angles), pages, slots
        return found if name == "rope" else (*found, jnp.full(rows, 0.3), jax.random.uniform(keys[1], heads[1:], minval=0.1))
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
    normed, rotated = partial(reference.quantize_normed, **norm), partial(rotate_and_write, implementation="xla")
    return {
        "gated": (ffn, *gated, gated_kernel, {"": None} | tried),
        "rows": (width, reference.quantize, xla_rows, mosaic_gpu.quantize, {"": None} | narrow),
        "norm": (width, normed, xla_normed, partial(mosaic_gpu.quantize_normed, **norm), {"": None}),
        "rope": (width, rotated, rotate_in_steps, mosaic_gpu_rope.rotate_and_write, {"": None}),
        "rope, 8 bits": (width, rotated, rotate_in_steps, mosaic_gpu_rope.rotate_and_write, {"": None}),
    }


def repeated(operation: Operation, count: int) -> Operation:
    """`count` of it in one program, one after the other. Gives the last one's results, and a number that needs all of them."""
    operation = jax.jit(operation)

    def run(rows: jax.Array, *rest: jax.Array) -> tuple[Any, jax.Array]:
        results: list[Any] = []
        for _ in range(count):
            rows, *last = jax.lax.optimization_barrier((rows, *results[-1:]))
            results[-1:] = last
            results.append(jax.lax.optimization_barrier(operation(rows, *rest)))
        return results[-1], jnp.sum(jnp.stack([x.ravel()[0].astype(jnp.float32) for both in results for x in both]))

    return run


def rotate_in_steps(qkv: jax.Array, cos: jax.Array, sin: jax.Array, pages: jax.Array, slots: jax.Array, *scales: Any) -> Any:
    """As a layer without the kernel does it."""
    if scales:
        qkv = (qkv.astype(jnp.float32) * scales[0][:, None, None, None] * scales[1]).astype(qkv.dtype)
    q, k, v = qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[-1]), qkv[:, :, -2], qkv[:, :, -1]
    implementation: Implementation = "mosaic_gpu" if jax.default_backend() == "gpu" else "xla"
    return rotate(q, (cos, sin)), write_kv(pages, rotate(k, (cos, sin)), v, slots, implementation)


def repeated_rope(operation: Operation, count: int) -> Operation:
    """The same of a rope with page write, whose pool goes from one to the next."""
    operation = jax.jit(operation)

    def run(qkv: jax.Array, cos: jax.Array, sin: jax.Array, pages: jax.Array, *rest: jax.Array) -> tuple[Any, jax.Array]:
        found = []
        for _ in range(count):
            qkv, pages = jax.lax.optimization_barrier((qkv, pages))
            q, pages = jax.lax.optimization_barrier(operation(qkv, cos, sin, pages, *rest))
            found.append(q.ravel()[0].astype(jnp.float32))
        return (q, pages), jnp.sum(jnp.stack(found))

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


def compare(got: Any, want: Any, is_largest: bool) -> dict[str, float]:
    """Which share of both results is other than the reference's, and how far off scales are."""
    bits = [x.view(jnp.uint8) if x.dtype.itemsize == 1 else x for x in (*got, *want)]
    share = [float(jnp.mean(a != b)) for a, b in ((bits[0], bits[2]), (bits[1], bits[3]))]
    if got[1].ndim > 1:
        return {"differ": max(share)}
    scales = reference.scale_of(got[1]) if is_largest else got[1]
    return {"differ": share[0], "scales off": float(jnp.max(jnp.abs(scales / want[1] - 1)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 8192])
    parser.add_argument("--widths", type=int, nargs=2, default=[4096, 14336], help="of the model and of its ffn")
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 8192], help="rows at which sizes of thread blocks are tried")
    parser.add_argument("--seconds", type=float, default=40, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin, device = time.perf_counter(), jax.devices()[0]
    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "widths": args.widths, "us": {}}
    pool, cases = ThreadPoolExecutor(12), []
    for rows in args.rows:
        count = 32 if rows <= 256 else 4
        for name, (width, check, xla, kernel, configs) in operations(*args.widths).items():
            arguments = inputs_of(name, rows, width)
            want = pool.submit(jax.jit(check), *arguments)
            sizes = configs if rows in args.sizes else {"": None}
            ways = {"xla": xla}
            for size in sizes if device.platform == "gpu" else ():
                ways[f"kernel {size}".strip()] = kernel if name.startswith("rope") else partial(kernel, config=sizes[size])
            for way, operation in ways.items():
                program = (repeated_rope if name.startswith("rope") else repeated)(operation, count)
                lowered = jax.jit(program).lower(*arguments)
                cases.append((f"{name}, {rows} rows, {way}", pool.submit(lowered.compile), arguments, count, want))
    for label, program, arguments, count, want in cases:
        if time.perf_counter() - begin > args.seconds:
            figures["us"][label] = "left out for want of time"
            continue
        try:
            compiled = program.result()
            got = compiled(*arguments)[0]
            found = compare(got, want.result(), label.endswith("xla"))
            us = microseconds(compiled, arguments, count)
            figures["us"][label] = {"us": us} | found
        except Exception as error:  # noqa: BLE001  the others are still wanted
            figures["us"][label] = f"{type(error).__name__}: {str(error)[:150]}"
        print(f"{label:36}", figures["us"][label], flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n")
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
