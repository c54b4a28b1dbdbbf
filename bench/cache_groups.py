"""What the KV cache of models with sliding windows takes: layers in groups with a page table each, beside one table for all.

The real scheduler serves 256 requests at once in a pool that holds them all; counted is the most that they ever hold.

usage: python bench/cache_groups.py [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bench.simulation.cases import CASES, COST, mixed
from jaxserve.models.cache_layout import CacheLayout, group_layers, one_table
from jaxserve.models.loading import describe_model, open_source
from jaxserve.runner import page_bytes
from jaxserve.sharding import Shardings, make_mesh
from jaxserve.simulation.cost import read_cost
from jaxserve.simulation.simulator import simulate
from jaxserve.simulation.trace import TraceRequest

HERE = Path(__file__).parent
MODELS = ("gemma-3-27b", "gpt-oss-20b")
REQUESTS, PAGE_SIZE, OUTPUT = 256, 16, 1024  # the first ones decode until the last ones have their prompts
PROMPTS = (512, 3072, 15360)
MAX_MODEL_LEN = 32768


def bytes_held(layout: CacheLayout, trace: list[TraceRequest]) -> int:
    """Of the pages that the requests hold at most, all devices and layers together."""
    longest = max(request.input_length + request.output_length for request in trace)
    pages = len(trace) * (longest // PAGE_SIZE + 2) * layout.num_tables
    cost = replace(
        read_cost(COST),
        page_size=PAGE_SIZE,
        num_pages=pages,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=8192,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
        windows=tuple(reach.window for reach in layout.reaches),
    )
    report = simulate(trace, cost)
    assert report.preemptions == 0, "the pool is to hold them all"
    return round(report.kv_use_peak * pages) * page_bytes(
        layout.arrays, PAGE_SIZE, jnp.dtype(jnp.bfloat16), Shardings(make_mesh(1))
    )


def measure(model: str) -> dict[str, Any]:
    """GB by work, and how the layers are grouped."""
    source = open_source(str(HERE / "models" / model), "dummy")
    specs = describe_model(source, dtype=jnp.dtype(jnp.bfloat16), kv_repeat=lambda heads: 1).cache_specs
    groups, one = group_layers(specs, MAX_MODEL_LEN), one_table(specs)
    work = {
        f"{n} + {OUTPUT} tokens each": [TraceRequest(timestamp=0, input_length=n, output_length=OUTPUT)] * REQUESTS
        for n in PROMPTS
    }
    work["the first 256 of mixed_1000"] = mixed(CASES["mixed_1000"])[:REQUESTS]
    result: dict[str, Any] = {"layers": len(specs), "page tables": str(groups), "GB": {}}
    for name, trace in work.items():
        one_gb, groups_gb = (round(bytes_held(layout, trace) / 1e9, 2) for layout in (one, groups))
        result["GB"][name] = {"one table": one_gb, "groups": groups_gb, "ratio": round(groups_gb / one_gb, 3)}
        print(f"{model}, {REQUESTS} x {name}: {groups_gb:,.2f} GB in groups, {one_gb:,.2f} GB with one table")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {"command": " ".join(["python", *sys.argv]), "requests": REQUESTS, "page size": PAGE_SIZE, "dtype": "bfloat16"}
    result |= {model: measure(model) for model in MODELS}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
