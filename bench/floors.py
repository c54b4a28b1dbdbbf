"""Prints the floor of a decode step: bytes of weights, experts and cache that it must move, at the H100's measured copy bandwidth.

usage: PYTHONPATH=. python bench/floors.py MODEL [--batches 1 64 256] [--context 256]

Weights are read once, experts as many as the tokens wake on average if each chooses at random, keys and values of the context
(of its window where a layer has one), recurrent states once read and once written.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import jax.numpy as jnp

from jaxserve.models.interface import StateSpec
from jaxserve.models.loading import describe_model, open_source

HERE = Path(__file__).parent
BYTES_PER_S = 2.92e12  # of a copy on the H100 that vLLM was measured on (bench/vllm_0.26_h100.json)


def floor_ms(model: str, batch: int, context: int) -> float:
    """Milliseconds a step of `batch` requests with `context` tokens each."""
    described = describe_model(open_source(str(HERE / "models" / model), "dummy"), dtype=jnp.bfloat16)
    config = json.loads((HERE / "models" / model / "config.json").read_text())
    num_experts = config.get("num_experts") or config.get("n_routed_experts") or config.get("num_local_experts") or 0
    awake = 1 - (1 - config.get("num_experts_per_tok", 0) / num_experts) ** batch if num_experts else 1.0
    total = 0.0
    for path, array in zip(described.paths, described.abstract, strict=True):
        size = array.size * array.dtype.itemsize
        is_lookup = path == "embed" and not config.get("tie_word_embeddings", False)
        total += size * awake if "experts_" in path else 0 if is_lookup else size
    for spec in described.cache_specs:
        if isinstance(spec, StateSpec):
            total += 2 * batch * math.prod(spec.shape) * jnp.dtype(spec.dtype or jnp.bfloat16).itemsize
        else:
            total += 2 * batch * spec.page_values(1, "xla") * min(context, spec.window or context)
    return total / BYTES_PER_S * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(p.name for p in (HERE / "models").iterdir()))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument(
        "--context", type=int, default=256, help="the decode cases': 128 tokens of prompt and half of 256 on average"
    )
    args = parser.parse_args()
    print(args.model, {b: round(floor_ms(args.model, b, args.context), 2) for b in args.batches})


if __name__ == "__main__":
    main()
