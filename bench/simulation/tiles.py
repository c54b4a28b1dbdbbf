"""What prefill attention computes in decode_b64_kv4096, counted with the real scheduler, packer and work list: tiles of 128 queries, and
the keys that these read. Prompts alone (the case's T1), and beside decodes with prompts that begin anywhere and where a tile may.

usage: JAX_PLATFORMS=cpu python bench/simulation/tiles.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.buckets import choose_buckets
from jaxserve.limits import Limits
from jaxserve.packing import Packer
from jaxserve.page_pool import PagePool
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import plan_prefill
from jaxserve.plan import PlanShape, step_batch, unpack
from jaxserve.request import Request, RequestGroup
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler

CASES = {case["name"]: case for case in json.loads((Path(__file__).parents[1] / "cases.json").read_text())["cases"]}
SLOTS, MAX_TOKENS, PAGE = 256, 8192, 16
BUCKETS = choose_buckets("gpu", SLOTS, MAX_TOKENS, pages_per_slot=512, page_size=PAGE)


@partial(jax.jit, static_argnames="shape")
def work_list(packed: jax.Array, shape: PlanShape) -> tuple[jax.Array, jax.Array]:
    """The tiles' items for one head, and how many there are."""
    batch = step_batch(
        unpack(packed, shape), jnp.zeros((SLOTS, BUCKETS.pages_per_slot), jnp.int32), jnp.zeros(SLOTS, jnp.int32), PAGE
    )
    rows = batch.query_start, batch.kv_lens, batch.num_single_rows
    plan = plan_prefill(*rows, num_tokens=shape.num_tokens, num_heads=1, num_kv_heads=1)
    return plan.items, plan.num_items[0]


def count(case: dict[str, Any], out_len: int, align: int) -> dict[str, Any]:
    """The steps that have prompts' tokens; nothing ends meanwhile."""
    limits = Limits(SLOTS, MAX_TOKENS, BUCKETS.max_page_updates, token_sizes=BUCKETS.tokens, align=align)
    scheduler = Scheduler(limits, PagePool(40_000), PAGE)
    packer = Packer(replace(BUCKETS, align=align), SLOTS)
    for order in range(case["batch"]):
        group = RequestGroup(str(order), [0] * case["in_len"], SamplingParams(), max_output_tokens=out_len, stop_ids=frozenset())
        scheduler.add(Request(group, 0, 0, (0, order)))
    sizes, tiles, keys = [], 0, 0
    while (plan := scheduler.schedule()) is not None and plan.rows:
        buffer = packer.pack(plan, plan.sample_rows())
        items, used = work_list(buffer.packed, buffer.shape)
        found = np.asarray(items)[: int(used)]
        sizes, tiles = [*sizes, buffer.shape.num_tokens], tiles + len(found)
        keys += int((found[:, 5] + found[:, 4]).sum())  # up to the last query's own position
    return {"steps": {size: sizes.count(size) for size in sorted(set(sizes))}, "tiles": tiles, "keys": keys}


def main() -> None:
    case = CASES["decode_b64_kv4096"]
    alone = count(case, 1, BUCKETS.align)
    result = {
        "alone": alone,
        "begin anywhere": count(case, case["out_len"], 1),
        "begin at tiles": count(case, case["out_len"], BUCKETS.align),
    }
    for counted in result.values():
        print(json.dumps(counted | {"more_keys_percent": round(100 * (counted["keys"] / alone["keys"] - 1), 2)}))


if __name__ == "__main__":
    main()
