"""Runs the cases of bench/cases.json on jaxserve and writes the figures beside vLLM's.

usage: python bench/run_cases.py MODEL [--cases NAME ...] [--out FILE] [-- engine options as KEY=VALUE]

Definitions are those of cases.json: dummy weights, token-id prompts, greedy, EOS ignored, all requests submitted at once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SPEC = json.loads((HERE / "cases.json").read_text())


def prompts_of(case: dict[str, Any], run: int, lengths: list[int], prefix: np.ndarray | None = None) -> list[list[int]]:
    rng = np.random.default_rng([SPEC["seed"], case["case_index"], run])
    low, high = SPEC["token_lo"], SPEC["token_hi"]
    head = [] if prefix is None else prefix.tolist()
    return [head + rng.integers(low, high, size=n).tolist() for n in lengths]


class Bench:
    """One engine and the clock."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def generate(self, prompts: list[list[int]], out_lens: list[int]) -> float:
        """Seconds from submission to the last token."""
        from jaxserve import SamplingParams

        params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in out_lens]
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(o.outputs[0].token_ids) for o in outputs] == out_lens
        return seconds

    def fixed(self, case: dict[str, Any]) -> dict[str, Any]:
        batch, in_len, out_len = case["batch"], case["in_len"], case["out_len"]

        def once(run: int, out: int) -> float:
            return self.generate(prompts_of(case, run, [in_len] * batch), [out] * batch)

        once(0, out_len)
        seconds = [once(r + 1, out_len) for r in range(case["repeats"])]
        if out_len == 1:
            return {"prompt_tok_s": [batch * in_len / t for t in seconds]}
        probe = [once(100 + r, 1) for r in range(case["repeats"])]
        step = [(t - p) / (out_len - 1) * 1000 for t, p in zip(seconds, probe, strict=True)]
        return {"decode_ms_per_step": step, "e2e_out_tok_s": [batch * out_len / t for t in seconds]}

    def mixed(self, case: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(case["len_seed"])

        def lengths(mean: float, sigma: float) -> list[int]:
            drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, case["n"])
            return np.clip(np.round(drawn), case["clip_lo"], case["clip_hi"]).astype(int).tolist()

        ins, outs = lengths(case["mean_in"], case["sigma_in"]), lengths(case["mean_out"], case["sigma_out"])
        warm = case["warmup_n"]
        self.generate(prompts_of(case, 0, ins[:warm]), outs[:warm])
        seconds = self.generate(prompts_of(case, 1, ins), outs)
        return {"req_s": [case["n"] / seconds], "out_tok_s": [sum(outs) / seconds]}

    def shared_prefix(self, case: dict[str, Any]) -> dict[str, Any]:
        def once(run: int, prefix: np.ndarray) -> float:
            prompts = prompts_of(case, run, [case["suffix_len"]] * case["n"], prefix)
            return case["n"] / self.generate(prompts, [case["out_len"]] * case["n"])

        def prefix_of(run: int) -> np.ndarray:
            rng = np.random.default_rng([SPEC["seed"], case["case_index"], run])
            return rng.integers(SPEC["token_lo"], SPEC["token_hi"], size=case["prefix_len"])

        warmup, timed = prefix_of(0), prefix_of(1)
        once(1000, warmup)
        return {"cold_req_s": [once(2001, timed)], "warm_req_s": [once(1001, timed)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(p.name for p in (HERE / "models").iterdir()))
    parser.add_argument("--cases", nargs="*", help="names; all if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of LLM")
    args = parser.parse_args()
    options = {k: json.loads(v) for k, _, v in (o.partition("=") for o in args.option)}

    imported = time.perf_counter()
    import jax

    from jaxserve import LLM

    start = time.perf_counter()
    llm = LLM(str(HERE / "models" / args.model), load_format="dummy", skip_tokenizer_init=True, **(SPEC["engine"] | options))
    ready = time.perf_counter()
    result: dict[str, Any] = {
        "model": args.model,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "options": options,
        "import_s": round(start - imported, 2),
        "engine_start_s": round(ready - start, 2),
        "engine": llm.engine.description,
        "cases": {},
    }
    print(json.dumps(result, indent=1), flush=True)
    bench = Bench(llm)
    for case in SPEC["cases"]:
        if args.cases and case["name"] not in args.cases:
            continue
        figures = getattr(bench, case["kind"])(case)
        result["cases"][case["name"]] = {name: round(float(np.median(runs)), 3) for name, runs in figures.items()}
        print(case["name"], result["cases"][case["name"]], flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
