"""The cases of bench/cases.json with ShareGPT-like and shared-prefix lengths, simulated: KV waste by page size, and speed beside
what was measured.

usage: python bench/simulation/cases.py [--out FILE] [--trace FILE]

--trace also writes the example trace beside this file anew: a part of the mixed case, as if it came in at 40 requests a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.simulation.cost import read_cost
from jaxserve.simulation.simulator import simulate
from jaxserve.simulation.trace import BLOCK_TOKENS, TraceRequest

HERE = Path(__file__).parent
CASES = {case["name"]: case for case in json.loads((HERE.parent / "cases.json").read_text())["cases"]}
COST = HERE / "qwen3-0.6b_h100.json"
MEASURED = HERE.parent / "results" / "qwen3-0.6b_h100_7f7d966.json"
PAGE_SIZES = (16, 32, 64, 128)
EXAMPLE = {"requests": 200, "per_s": 40.0}


def mixed(case: dict[str, Any]) -> list[TraceRequest]:
    """The case's lengths, drawn as `jaxserve bench offline` does, all at once."""
    rng = np.random.default_rng(case["len_seed"])

    def lengths(mean: float, sigma: float) -> list[int]:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, case["n"])
        return np.clip(np.round(drawn), case["clip_lo"], case["clip_hi"]).astype(int).tolist()

    ins, outs = lengths(case["mean_in"], case["sigma_in"]), lengths(case["mean_out"], case["sigma_out"])
    return [TraceRequest(timestamp=0, input_length=i, output_length=o) for i, o in zip(ins, outs, strict=True)]


def shared_prefix(case: dict[str, Any]) -> list[TraceRequest]:
    ids = tuple(range(case["prefix_len"] // BLOCK_TOKENS))
    length = case["prefix_len"] + case["suffix_len"]
    return [TraceRequest(timestamp=0, input_length=length, output_length=case["out_len"], hash_ids=ids) for _ in range(case["n"])]


def write_example(path: Path) -> None:
    """A part of the mixed case, arriving at random; every fourth request begins like the one four before."""
    rng = np.random.default_rng(0)
    requests = mixed(CASES["mixed_1000"])[: EXAMPLE["requests"]]
    times = np.cumsum(rng.exponential(1e3 / EXAMPLE["per_s"], len(requests)))
    with path.open("w") as file:
        for number, (request, time_ms) in enumerate(zip(requests, times, strict=True)):
            line: dict[str, Any] = {"timestamp": round(float(time_ms), 1), "input_length": request.input_length}
            if number % 4 == 0:
                line |= {"input_length": BLOCK_TOKENS + request.input_length, "hash_ids": [7]}
            file.write(json.dumps(line | {"output_length": request.output_length}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    if args.trace:
        write_example(args.trace)
    cost = read_cost(COST)
    measured = json.loads(MEASURED.read_text())["cases"]
    work = {"mixed_1000": mixed(CASES["mixed_1000"]), "shared_prefix": shared_prefix(CASES["shared_prefix"])}
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "cost": cost.name, "kv_waste_percent": {}, "cases": {}}
    for page_size in PAGE_SIZES:
        pages = cost.num_pages * cost.page_size // page_size
        report = simulate(work["mixed_1000"], replace(cost, page_size=page_size, num_pages=pages))
        result["kv_waste_percent"][page_size] = round(100 * report.kv_waste, 2)
    for name, trace in work.items():
        found = measured[name].get("req_s") or measured[name]["cold_req_s"]
        result["cases"][name] = simulate(trace, cost).as_dict() | {"measured_requests_per_s": found}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
