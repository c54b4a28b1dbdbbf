"""Times what decode steps of recurrent models and of experts of few tokens run on one GPU: PYTHONPATH=. python bench/kernels/small_steps.py

Each kernel's own device time, from the profiler, and the bandwidth of what it must read (and write). Takes half a minute. --out FILE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels.attention import BF16, device_us
from jaxserve.pallas_kernels.decayed_state import advance
from jaxserve.pallas_kernels.few_experts import TOKENS, choose, multiply

EXPERTS = {  # experts, of a token, D, F
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "DeepSeek-V2-Lite": (64, 6, 2048, 1408),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}


def experts(name: str, used: int) -> dict[str, Any]:
    num, top_k, width, hidden = EXPERTS[name]
    keys = jax.random.split(jax.random.key(0), 4)
    up, down = (
        jax.jit(lambda key, shape=shape: jax.random.normal(key, shape, BF16))(key)
        for key, shape in zip(keys, [(num, width, 2 * hidden), (num, hidden, width)], strict=False)
    )
    x, scores = jax.random.normal(keys[2], (TOKENS, width), BF16), jax.random.uniform(keys[3], (TOKENS, num))

    def layer(x: jax.Array, scores: jax.Array, up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        choice = choose(lambda *both: both, (scores, scores), jnp.asarray([used]), top_k, normalize=True)
        return multiply(multiply(x, up, choice, jax.nn.silu), down, choice), choice.num_blocks

    f, args = jax.jit(layer), (x, scores, up, down)
    active = int(f(*args)[1][0])
    products, _ = device_us(f, args, "expert_products")  # the median of both: their mean
    choosing, _ = device_us(f, args, "choose_experts")
    num_bytes = active * 3 * width * hidden * 2
    figures = {"active": active, "choose_us": choosing, "products_us": 2 * products, "gbps": num_bytes / (2 * products) / 1e3}
    return {"case": f"{name}, {used} tokens"} | figures


def states(rows: int) -> dict[str, Any]:
    """Falcon-H1-7B: 24 heads of 128 x 256."""
    slots, heads, dim, size = 256, 24, 128, 256
    pool = jnp.zeros((slots, heads, dim, size))
    q, v, decay = jnp.ones((rows, 1, size)), jnp.ones((rows, heads, dim)), -jnp.ones((rows, heads))
    place = jnp.arange(rows, dtype=jnp.int32) * (slots // rows)
    f = jax.jit(lambda pool, *args: advance(pool, *args)[1])  # the pool is not donated, so it is copied beside it
    args = (pool, q, q, v, decay, place, jnp.zeros(rows, bool))
    jax.block_until_ready(f(*args))
    us, _ = device_us(f, args, "decayed_state")
    return {"case": f"states of {rows} requests", "us": us, "gbps": 2 * rows * heads * dim * size * 4 / us / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out")
    out = parser.parse_args().out
    found = []
    for make, args in [(experts, (name, used)) for name in EXPERTS for used in (1, 16)] + [(states, (n,)) for n in (1, 64, 256)]:
        found.append(make(*args))
        print(found[-1], flush=True)
        if out:
            Path(out).write_text(json.dumps({"device": jax.devices()[0].device_kind, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
