"""Times one layer of experts on one device, each way of computing it: PYTHONPATH=. python bench/kernels/experts.py [--out FILE].

A loop of layers in one program, each one's output the next one's input; the same weights, which are more than the caches hold.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers import moe
from jaxserve.models.spec import MlpSpec, MoeSpec, RouterSpec
from jaxserve.sharding import make_mesh

LAYERS = 20
SHAPES = {  # model width, experts
    "qwen3-30b-a3b": (2048, MoeSpec(num_experts=128, top_k=8, expert=MlpSpec(dim=768, activation="silu"), router=RouterSpec())),
    "gpt-oss-20b": (2880, MoeSpec(num_experts=32, top_k=4, expert=MlpSpec(dim=2880, activation="silu"), router=RouterSpec())),
    "deepseek-v2-lite": (
        2048,
        MoeSpec(num_experts=64, top_k=6, expert=MlpSpec(dim=1408, activation="silu"), router=RouterSpec()),
    ),
}


def batch_of(tokens: int) -> StepBatch:
    """One request of that many tokens; a layer of experts looks at no more."""
    ints = jnp.arange(tokens)
    return StepBatch(
        ints, ints, jnp.asarray([0, tokens]), jnp.asarray([tokens]), ints[None], ints, jnp.int32(0), ints[:1], ints[:1]
    )


def seconds(layer: Any, tokens: int, runtime: Runtime) -> float:
    """Of one layer."""
    graph, state = nnx.split(layer)
    width = layer.router.get_value().shape[0]

    @jax.jit
    def layers(state: Any, x: jax.Array) -> jax.Array:
        layer, batch = nnx.merge(graph, state), batch_of(tokens)

        def one(_: Any, x: jax.Array) -> jax.Array:
            # Half of it noise of old: outputs alone become ever more alike, and would wake the same few experts.
            y = layer(x, batch, runtime)
            return y / jnp.maximum(jnp.abs(y).max(), 1e-3) + jnp.roll(x, 1, axis=1)

        return jax.lax.fori_loop(0, LAYERS, one, x)

    x = jax.random.normal(jax.random.key(0), (tokens, width), jnp.bfloat16)
    layers(state, x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        layers(state, x).block_until_ready()
        times.append((time.perf_counter() - start) / LAYERS)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 256, 2048, 8192])
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--experts", type=int, help="fewer, to try this out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    runtimes = {
        name: Runtime("gpu" if device.platform == "gpu" else "cpu", make_mesh(1), kernel)
        for name, kernel in (("kernel", "mosaic_gpu"), ("ragged_dot", "xla"))
    }
    figures: dict[str, Any] = {"device": device.device_kind, "microseconds a layer": {}}
    for name in args.models:
        width, spec = SHAPES[name]
        spec = replace(spec, num_experts=args.experts or spec.num_experts)
        layer = moe.Moe(width, spec, jnp.bfloat16)
        for array in (layer.router, layer.experts_up, layer.experts_down):
            shape = array.get_value().shape
            array.set_value(jax.random.normal(jax.random.key(1), shape, jnp.bfloat16) * shape[-2] ** -0.5)
        for tokens in args.tokens:
            row = figures["microseconds a layer"].setdefault(name, {})[tokens] = {}
            for way in ("kernel", "ragged_dot", "every expert"):
                if (way == "every expert") != (16 <= tokens <= 256) and way != "kernel":
                    continue
                moe._reads_all = lambda *_, every=way == "every expert": every  # type: ignore[assignment]
                try:
                    row[way] = round(seconds(layer, tokens, runtimes.get(way, runtimes["ragged_dot"])) * 1e6, 1)
                except Exception as error:  # noqa: BLE001  the other shapes are still wanted
                    row[way] = f"{type(error).__name__}: {str(error)[:200]}"
            print(name, tokens, row, flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
