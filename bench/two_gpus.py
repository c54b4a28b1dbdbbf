"""Two GPUs of one host beside one, in one run: tensor and data parallelism, tokens, and a soak of GPUs that add up by themselves.

usage: python bench/two_gpus.py --output FILE [--budget-s 400] [--only one,tp2,dp2,...]

Each phase is a process of its own with its own limit, so a hang costs that phase alone; FILE is written after each. Phases come in
the order of their worth, and one for which too little of the budget is left is skipped. Figures are those of `jaxserve bench
offline`. DP 2 gets twice a case's requests, so that each GPU has as many as the one GPU of phase "one".
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxserve.cli_bench.offline import Offline, circumstances, read_spec
from jaxserve.cli_engine import engine_config

HERE = Path(__file__).parent
CASES = ("decode_b1", "decode_b64", "decode_b256", "mixed_1000")
NEAR_TIE = 0.1  # nats between the two likeliest tokens, below which bfloat16 sums in another order may choose the other
STUCK_S = 30.0  # a step takes milliseconds
TP2 = {"tensor_parallel_size": 2}
UNCACHED = TP2 | {"compilation_cache_dir": ""}


@dataclass(frozen=True)
class Phase:
    """What one process measures.

    Attributes:
        options: of the engine.
        cases: names; then comes what `kind` adds.
        scale: how many times a case's requests are submitted.
        patches: module, attribute and value, of what no option says. Such phases have no caches, which know nothing of it.
        needs_s: with less of the budget left it is not begun.
        limit_s: after which it is killed.
    """

    options: dict[str, Any]
    cases: tuple[str, ...] = CASES
    scale: int = 1
    compares: bool = True
    soaks: bool = False
    patches: tuple[tuple[str, str, Any], ...] = ()
    needs_s: float = 60
    limit_s: float = 150


PHASES = {
    "one": Phase({}),
    "tp2": Phase(TP2, limit_s=130),
    "soak": Phase(TP2 | {"enable_prefix_caching": False}, (), compares=False, soaks=True, limit_s=100),
    "dp2": Phase({"data_parallel_size": 2}, scale=2, compares=False, limit_s=110),
    "tp2_norms_apart": Phase(
        UNCACHED, CASES[:3], patches=(("jaxserve.models.interface", "Runtime.norms_sums", False),), compares=False, limit_s=100
    ),
    "tp2_xla": Phase(TP2 | {"peer_sums": False}, CASES[:3], limit_s=110),
}


def main() -> None:
    args = arguments()
    names = list(PHASES) if args.only is None else args.only.split(",")
    if args.phase is not None:
        run_phase(args, PHASES[args.phase])
        return
    until_s = time.monotonic() + args.budget_s
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "definitions": str(args.cases), "phases": {}}
    for name in names:
        phase, left_s = PHASES[name], until_s - time.monotonic()
        found = {"ended": f"skipped: {left_s:.0f} s were left"} if left_s < phase.needs_s else start(args, name, phase, left_s)
        for key in ("machine", "date", "commit", "jaxserve", "jax"):  # the same of all
            if key in found:
                result[key] = found.pop(key)
        result["phases"][name] = found
        result["beside_one"] = beside_one(result["phases"])
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps({key: value for key, value in found.items() if key != "tokens"}), flush=True)
    print(json.dumps(result["beside_one"], indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "models" / "llama-3.1-8b"))
    parser.add_argument("--cases", type=Path, default=HERE / "cases.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=400)
    parser.add_argument("--only", help="names of phases")
    parser.add_argument("--soak-steps", type=int, default=10_000)
    parser.add_argument("--soak-requests", type=int, default=16)
    parser.add_argument("--patience", type=float, default=1, help="times the limits of phases")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace, name: str, phase: Phase, left_s: float) -> dict[str, Any]:
    """Runs a phase in a process, and gives what it had written when it ended or was ended."""
    part = args.output.with_name(f"{args.output.stem}.{name}.part")
    part.unlink(missing_ok=True)
    # NVLink multicast stays off: a program that uses it can put a shared host's GPUs out of service.
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}
    command = [sys.executable, *sys.argv, "--phase", name, "--output", str(part)]
    started_s = time.monotonic()
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=sys.stderr)
    limit_s = min(phase.limit_s * args.patience, left_s)
    try:
        code = process.wait(limit_s)
        ended = "whole" if code == 0 else f"with exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = f"killed after {limit_s:.0f} s"
    found: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    return found | {"ended": ended, "wall_s": round(time.monotonic() - started_s, 1)}


def run_phase(args: argparse.Namespace, phase: Phase) -> None:
    """Measures one phase in this process, and writes what is known after each case."""
    spec = read_spec(args.cases)
    started_s = time.perf_counter()
    own = {"load_format": "dummy", "skip_tokenizer_init": True}
    config = engine_config(own | spec.get("engine", {}) | phase.options | {"model": args.model})
    import jax

    from jaxserve.llm import LLM
    from jaxserve.startup import build_engine

    for module, name, patch in phase.patches:
        *path, last = name.split(".")
        setattr(reduce(getattr, path, import_module(module)), last, patch)
    found: dict[str, Any] = circumstances(jax.devices()) | {"options": phase.options}
    del found["command"]

    def keep(key: str, value: Any) -> None:
        found[key] = value
        temporary = args.output.with_suffix(".new")
        temporary.write_text(json.dumps(found))
        temporary.replace(args.output)

    with LLM.from_engine(build_engine(config)) as llm:
        keep("engine_start_s", round(time.perf_counter() - started_s, 2))
        bench, cases = Offline(llm, spec), {}
        if phase.compares:
            keep("tokens", greedy_tokens(llm, spec))
        for case in (case for name in phase.cases for case in spec["cases"] if case["name"] == name):
            count = "n" if case["kind"] == "mixed" else "batch"
            cases[case["name"]] = bench.measure(case | {count: case[count] * phase.scale})
            keep("cases", cases)
        if phase.soaks:
            soak(llm, spec, args.soak_steps, args.soak_requests, keep)
        keep("collectives", collectives(llm))


def collectives(llm: Any) -> dict[str, int]:
    """How often each kind of talk between devices occurs in the smallest decode program."""
    runner = getattr(llm.engine, "engines", [llm.engine])[0].runner
    shape = min(runner.buckets.decode_shapes.values(), key=lambda shape: shape.num_tokens)
    text = runner.programs.forward(shape).as_text()
    kinds = (" all-reduce(", " all-reduce-start(", " all-gather(", " all-gather-start(", "ONE_SHOT", "TWO_SHOT")
    return {kind.strip(" ("): text.count(kind) for kind in kinds if kind in text}


def greedy_tokens(llm: Any, spec: dict[str, Any]) -> list[dict[str, list[Any]]]:
    """Greedy tokens of some prompts, with each one's log probability and how far the next likeliest was behind it."""
    import numpy as np

    from jaxserve.sampling_params import SamplingParams

    rng = np.random.default_rng([spec["seed"], 99])
    prompts = rng.integers(spec["token_lo"], spec["token_hi"], size=(16, 64)).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=64, detokenize=False, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    kept = []
    for output in outputs:
        tokens, places = output.outputs[0].token_ids, output.outputs[0].logprobs
        best = [sorted((x.logprob for x in place.values()), reverse=True) for place in places]
        logprobs = [round(place[token].logprob, 4) for token, place in zip(tokens, places, strict=True)]
        kept.append({"tokens": tokens, "logprobs": logprobs, "gaps": [round(x[0] - x[1], 4) for x in best]})
    return kept


def soak(llm: Any, spec: dict[str, Any], steps: int, count: int, keep: Any) -> None:
    """Decodes in two runs of the same prompts, whose tokens must be the same; says so if no step ends for long."""
    import numpy as np

    from jaxserve.sampling_params import OutputKind, SamplingParams

    rng = np.random.default_rng([spec["seed"], 98])
    prompts = rng.integers(spec["token_lo"], spec["token_hi"], size=(count, 64)).tolist()
    final = OutputKind.FINAL_ONLY
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=steps // 2, detokenize=False, output_kind=final)
    progress = {"steps": 0, "at_s": time.monotonic()}

    def watch() -> None:
        while True:
            time.sleep(0.5)
            if time.monotonic() - progress["at_s"] > STUCK_S:
                keep("soak", {"steps": progress["steps"], "outcome": f"no step ended for {STUCK_S:.0f} s"})
                faulthandler.dump_traceback()
                os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    started_s, runs = time.perf_counter(), []
    for _ in range(2):
        tokens = {}
        names = [llm.engine.add_request(prompt, params) for prompt in prompts]
        while llm.engine.has_work:
            for output in llm.engine.step():
                tokens[output.request_id] = output.outputs[0].token_ids
            progress |= {"steps": progress["steps"] + 1, "at_s": time.monotonic()}
            if progress["steps"] % 500 == 0:
                keep("soak", {"steps": progress["steps"], "outcome": "under way"})
        runs.append([tokens[name] for name in names])
    seconds, progress["at_s"] = time.perf_counter() - started_s, float("inf")
    figures = {
        "steps": progress["steps"],
        "requests": count,
        "ms_per_step": seconds / progress["steps"] * 1000,
        "same_tokens": sum(a == b for a, b in zip(*runs, strict=True)),
        "outcome": "whole",
    }
    keep("soak", figures)


def beside_one(phases: dict[str, Any]) -> dict[str, Any]:
    """How often as fast each phase is as one GPU, and whether its tokens are the same."""
    one = phases.get("one", {})
    found: dict[str, Any] = {}
    for name, phase in phases.items():
        rates = {
            f"{case} {rate}": round(figures[rate] / one["cases"][case][rate], 3)
            for case, figures in phase.get("cases", {}).items()
            if case in one.get("cases", {})
            for rate in ("decode_tok_s", "req_s", "out_tok_s")
            if rate in figures
        }
        if name != "one" and rates:
            found[name] = rates
        if name != "one" and "tokens" in phase and "tokens" in one:
            found.setdefault(name, {})["tokens"] = compare(one["tokens"], phase["tokens"])
    return found


def compare(reference: list[dict[str, list[Any]]], others: list[dict[str, list[Any]]]) -> dict[str, Any]:
    """Where tokens first differ, by how much the reference preferred its own; up to there, how far log probabilities differ."""
    gaps, apart = [], 0.0
    for ours, theirs in zip(reference, others, strict=True):
        pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours["tokens"]))
        if same < len(ours["tokens"]):
            gaps.append(ours["gaps"][same])
        pairs_of_logprobs = zip(ours["logprobs"][:same], theirs["logprobs"][:same], strict=True)
        apart = max([apart, *(abs(a - b) for a, b in pairs_of_logprobs)])
    return {
        "prompts": len(reference),
        "differ": len(gaps),
        "largest_gap": max(gaps, default=0.0),
        "no_near_ties": sum(gap > NEAR_TIE for gap in gaps),
        "logprobs_apart": round(apart, 4),
    }


if __name__ == "__main__":
    main()
