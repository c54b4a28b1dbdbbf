"""the cases of a file, such as this repository's bench/cases.json, by their definitions

Dummy weights (unless --load-format says otherwise), prompts of random token ids, greedy, no early end, all requests of a case at
once. A case of kind "fixed" is B requests of in_len and out_len tokens, "mixed" log-normal lengths, "shared_prefix" one prefix
with many suffixes, first not cached, then cached. The median of the repeats is the figure, and all times are kept (T, and T1 of
the same prompts with one output token).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jaxserve.cli_engine import ENGINE_OPTIONS, add_engine_flags, engine_config
from jaxserve.cli_flags import read_options
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from jaxserve.llm import LLM

Case = dict[str, Any]
Figures = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with a config.json, or what serve takes")
    parser.add_argument("--cases", type=Path, metavar="FILE", required=True, help="JSON: seed, range of token ids, engine, cases")
    parser.add_argument("--only", metavar="A,B", help="names of the cases to run; all if not given")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the result is written after each case")
    parser.add_argument("--config", metavar="FILE", help="YAML file of engine options; they and flags win over those of --cases")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> None:
    spec = read_spec(args.cases)
    cases = _chosen(spec["cases"], args.only)
    own = {"load_format": "dummy", "skip_tokenizer_init": True}
    config = engine_config(own | spec.get("engine", {}) | read_options(args, ENGINE_OPTIONS))
    started_s = time.perf_counter()
    import jax

    from jaxserve.llm import LLM
    from jaxserve.startup import build_engine

    imported_s = time.perf_counter()
    with LLM.from_engine(build_engine(config)) as llm:
        result = {
            **circumstances(jax.devices()),
            "model": args.model,
            "import_s": round(imported_s - started_s, 2),
            "engine_start_s": round(time.perf_counter() - imported_s, 2),
            "engine": llm.engine.description,
            "cases": {},
        }
        bench = Offline(llm, spec)
        for case in cases:
            result["cases"][case["name"]] = bench.measure(case)
            print(case["name"], json.dumps(result["cases"][case["name"]]), file=sys.stderr, flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def read_spec(path: Path) -> dict[str, Any]:
    """The file of cases.

    Raises:
        ConfigError: it cannot be read, or is of another form.
    """
    try:
        spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read --cases {path}: {e}") from e
    wanted = {"seed": int, "token_lo": int, "token_hi": int, "cases": list}
    for name, kind in wanted.items():
        if not isinstance(spec, dict) or not isinstance(spec.get(name), kind):
            raise ConfigError(
                f"--cases {path} must be a JSON object with {', '.join(wanted)}; {name} is missing or no {kind.__name__}"
            )
    for case in spec["cases"]:
        if not isinstance(case, dict) or case.get("kind") not in KINDS or "name" not in case:
            raise ConfigError(f"--cases {path}: each case has a name and a kind ({', '.join(KINDS)}); got {str(case)[:100]}")
    return spec


def _chosen(cases: list[Case], only: str | None) -> list[Case]:
    names = [case["name"] for case in cases]
    wanted = names if only is None else only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"--only: there is no case {unknown[0]!r}; the file has {', '.join(names)}")
    return [case for case in cases if case["name"] in wanted]


def circumstances(devices: Sequence[Any]) -> dict[str, Any]:
    """What figures mean nothing without."""
    import jax

    from jaxserve import __version__

    git = shutil.which("git")
    folder = Path(__file__).parent
    commit = (
        subprocess.run([git, "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False) if git else None
    )
    return {
        "machine": f"{len(devices)} x {devices[0].device_kind}",
        "date": datetime.now(UTC).date().isoformat(),
        "jaxserve": __version__,
        "commit": commit.stdout.strip() or None if commit else None,
        "jax": jax.__version__,
        "command": " ".join(["jaxserve", *sys.argv[1:]]),
    }


class Offline:
    """Runs cases on one engine."""

    def __init__(self, llm: LLM, spec: dict[str, Any]) -> None:
        self._llm = llm
        self._spec = spec

    def measure(self, case: Case) -> Figures:
        """The case's figures.

        Raises:
            ConfigError: the case lacks a field.
        """
        started_s = time.perf_counter()
        try:
            figures = KINDS[case["kind"]](self, case)
        except KeyError as e:
            raise ConfigError(f"case {case['name']} lacks {e}, which kind {case['kind']!r} needs") from e
        return figures | {"case_wall_s": time.perf_counter() - started_s}

    def _seconds(self, case: Case, run: int, ins: list[int], outs: list[int], prefix: Sequence[int] = ()) -> float:
        """From submission to the last token of a run, whose tokens no other run has."""
        from jaxserve.sampling_params import SamplingParams

        rng = self._rng(case, run)
        prompts = [[*prefix, *self._tokens(rng, n)] for n in ins]
        params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in outs]
        started_s = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started_s
        assert [len(output.outputs[0].token_ids) for output in outputs] == outs
        return seconds

    def _rng(self, case: Case, run: int) -> np.random.Generator:
        import numpy as np

        return np.random.default_rng([self._spec["seed"], case["case_index"], run])

    def _tokens(self, rng: np.random.Generator, count: int) -> list[int]:
        drawn: list[int] = rng.integers(self._spec["token_lo"], self._spec["token_hi"], size=count).tolist()
        return drawn

    def fixed(self, case: Case) -> Figures:
        batch, in_len, out_len, repeats = (case[name] for name in ("batch", "in_len", "out_len", "repeats"))

        def once(run: int, out: int) -> float:
            return self._seconds(case, run, [in_len] * batch, [out] * batch)

        once(0, out_len)
        times = [once(1 + r, out_len) for r in range(repeats)]
        t = median(times)
        if out_len == 1:
            return {"T": times, "prompt_tok_s": batch * in_len / t}
        figures: Figures = {"T": times, "e2e_out_tok_s": batch * out_len / t}
        if case["probe_out1"]:
            probes = [once(100 + r, 1) for r in range(repeats)]
            decode_s = t - median(probes)
            figures |= {
                "T1": probes,
                "decode_ms_per_step": decode_s / (out_len - 1) * 1000,
                "decode_tok_s": batch * (out_len - 1) / decode_s,
                "prefill_T1_prompt_tok_s": batch * in_len / median(probes),
            }
        return figures

    def mixed(self, case: Case) -> Figures:
        import numpy as np

        rng = np.random.default_rng(case["len_seed"])

        def lengths(mean: float, sigma: float) -> list[int]:
            drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, case["n"])
            rounded: list[int] = np.clip(np.round(drawn), case["clip_lo"], case["clip_hi"]).astype(int).tolist()
            return rounded

        ins, outs = lengths(case["mean_in"], case["sigma_in"]), lengths(case["mean_out"], case["sigma_out"])
        warm_up = case["warmup_n"]
        self._seconds(case, 0, ins[:warm_up], outs[:warm_up])
        return _rates([self._seconds(case, 1 + r, ins, outs) for r in range(case["repeats"])], ins, outs)

    def shared_prefix(self, case: Case) -> Figures:
        count, prefix_len, suffix_len = case["n"], case["prefix_len"], case["suffix_len"]
        ins, outs = [suffix_len] * count, [case["out_len"]] * count

        def once(run: int, prefix: list[int]) -> float:
            return self._seconds(case, run, ins, outs, prefix)

        def prefix_of(run: int) -> list[int]:
            return self._tokens(self._rng(case, run), prefix_len)

        once(1000, prefix_of(0))
        cold, warm = [], []
        for r in range(1, 1 + case["repeats"]):
            prefix = prefix_of(r)
            cold.append(once(2000 + r, prefix))
            warm.append(once(1000 + r, prefix))
        whole = [prefix_len + suffix_len] * count
        return {"cold": _rates(cold, whole, outs), "warm": _rates(warm, whole, outs)}


def _rates(times: list[float], ins: list[int], outs: list[int]) -> Figures:
    t = median(times)
    return {"T": times, "req_s": len(ins) / t, "out_tok_s": sum(outs) / t, "total_tok_s": sum(ins + outs) / t}


KINDS: dict[str, Callable[[Offline, Case], Figures]] = {
    "fixed": Offline.fixed,
    "mixed": Offline.mixed,
    "shared_prefix": Offline.shared_prefix,
}
