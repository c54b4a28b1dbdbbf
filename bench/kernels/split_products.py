"""Times products of few rows whose parts are added up by who reads them: PYTHONPATH=. python bench/kernels/split_products.py [--out FILE].

XLA cuts the inputs of such a product in parts, so that all multiprocessors have work, and adds up in a kernel of its own. Cut in the
program instead, the parts [S, T, N] are added up by the kernel that reads them: a rope, a norm. Microseconds a product of many in
one CUDA graph, with weights that no cache holds: as it is ("whole"), and in S parts without the sum.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "down": (4096, 14336), "up": (28672, 4096)}  # Llama-3.1-8B: outputs, inputs
TYPES = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}


def whole(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def in_parts(x: jax.Array, w: jax.Array, count: int) -> jax.Array:
    """[S, T, N] in float32."""
    x, w = x.reshape(x.shape[0], count, -1), w.reshape(w.shape[0], count, -1)
    return jax.lax.dot_general(x, w, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.float32)


def repeated(product: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    """Each weight's product `repeats` times, one after the other; a number that needs all of them."""

    def run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        found: list[jax.Array] = []
        for w in weights * repeats:
            x, *last = jax.lax.optimization_barrier((x, *found[-1:]))
            found[-1:] = last
            found.append(jax.lax.optimization_barrier(product(x, w)))
        return jnp.sum(jnp.stack([y.ravel()[0].astype(jnp.float32) for y in found]))

    return run


def microseconds(program: Any, arguments: tuple[Any, ...], count: int) -> float:
    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = program(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls / count * 1e6

    timed(3)
    return round(min(timed(5) for _ in range(4)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--weights", type=int, default=8, help="different ones, which together are more than a cache holds")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin, device = time.perf_counter(), jax.devices()[0]
    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "rows": args.rows, "us": {}}
    ways = {"whole": whole} | {f"{count} parts": partial(in_parts, count=count) for count in args.parts}
    for kind, dtype in TYPES.items():
        for name, (outputs, inputs) in SHAPES.items():
            keys = jax.random.split(jax.random.key(0), args.weights + 1)
            x = jax.random.normal(keys[0], (args.rows, inputs)).astype(dtype)
            weights = [jax.random.normal(key, (outputs, inputs), jnp.bfloat16).astype(dtype) for key in keys[1:]]
            for way, product in ways.items():
                if time.perf_counter() - begin > args.seconds:
                    continue
                program = jax.jit(repeated(product, args.repeats)).lower(x, weights).compile()
                us = microseconds(program, (x, weights), args.weights * args.repeats)
                rate = outputs * inputs * x.dtype.itemsize / us / 1e6
                figures["us"][f"{kind} {name}, {way}"] = {"us": us, "TB/s of weights": round(rate, 2)}
                print(f"{kind} {name}, {way:10}", us, f"{rate:.2f} TB/s, after {time.perf_counter() - begin:.0f} s", flush=True)
                if args.out:
                    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
