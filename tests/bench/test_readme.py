"""README.md's figures are those of bench/: of each case the last run, and vLLM's and the floor beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import plot

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"
OTHER = {"kv_cache_dtype", "block_size", "tried"}  # of runs that the table does not show: options, and changes that did not land
DECODE = ["decode_b1", "decode_b64", "decode_b256"]

# How a row's first cell ends -> the cases of its figures
CASES = {
    r"decode, batch 1 / 64 / 256 \(ms a step\)": DECODE,
    r"64 requests of 4,096 tokens \(ms a step\)": ["decode_b64_kv4096"],
    r"prefill \(prompt tokens/s\)": ["prefill_16x4096"],
    r"mixed requests / shared prefix, warm \(requests/s\)": ["mixed_1000", "shared_prefix"],
    r"prefill \(tokens/s\)|, the same": [*DECODE, "prefill_16x4096"],
}


def rows(beginning: str) -> list[list[str]]:
    """The cells of the table whose head is that."""
    table = README[README.index(beginning) :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def assert_reads(text: str, measured: list[float], what: str) -> None:
    """Each number of the text is the measured one, rounded to as many digits."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
    assert len(found) == len(measured), f"{what}: {text}"
    for number, value in zip(found, measured, strict=True):
        half = 0.501 * 10.0 ** -len(number.partition(".")[2])
        assert abs(float(number.replace(",", "")) - value) <= half, f"{what}: {number} in README.md, measured {value}"


def figure(case: dict[str, Any]) -> float:
    """What a case is judged by."""
    for name in ("decode_ms_per_step", "vllm_ms_per_step", "prompt_tok_s", "vllm_prompt_tok_s"):
        if name in case:
            return float(case[name])
    return plot.warm(case)


def last_run(file: Path, name: str) -> float:
    """Of that case, by the defaults."""
    runs = json.loads(file.read_text())["runs"]
    return [figure(run["cases"][name]) for run in runs if name in run["cases"] and not OTHER & run["options"].keys()][-1]


def seconds_to_ready(name: str) -> float:
    start = json.loads((RESULTS / "startup_h100.json").read_text())["starts"][name]
    return float(start["ready_at_s"] if "ready_at_s" in start else start["import_s"] + start["engine_start_s"])


def test_one_gpu() -> None:
    vllm = json.loads(plot.VLLM.read_text())["cases"]
    read, model = set(), ""
    for label, ours, theirs, floor in rows("| | jaxserve | vLLM 0.26 |"):
        names = next((names for pattern, names in CASES.items() if re.search(f"(?:{pattern})$", label)), None)
        if names is None:
            which = "empty cache" if label.startswith("seconds to ready, first start") else "second"
            assert_reads(ours, [seconds_to_ready(f"{dtype}, {which}") for dtype in ("bf16", "fp8")], label)
            continue
        if not label.startswith("same"):
            model = re.sub(r",.*| as", "", label).lower()
        file = RESULTS / "h100" / f"{model.replace(' ', '_')}.json"
        assert_reads(ours, [last_run(file, name) for name in names], label)
        read |= {(file, name) for name in names}
        if theirs:
            cases = [vllm[model][name] for name in names]
            assert_reads(theirs, [figure(case) for case in cases], label)
            floors = [case.get("floor_ms", case.get("ceiling_prompt_tok_s")) for case in cases]
            assert_reads(floor, [value for value in floors if value is not None], label)
    assert {file for file, _ in read} == set((RESULTS / "h100").glob("*.json")), "a file of results has no row"


def test_two_gpus() -> None:
    found = json.loads((RESULTS / "two_gpus_h200.json").read_text())
    two, one = (found["phases"][name]["cases"] for name in ("tp2", "one"))
    beside = found["beside_one"]
    text = " ".join(README[README.index("Two H200s of one host beside one") :].partition("\n\n")[0].split())
    match = re.search(
        r"gives ([\d.]+) times .* and ([\d.]+) in the mixed .* decode takes (.*) ms a step at .* where one GPU takes (.*), so "
        r"(.*) times as fast, mixed requests (.*) times; ",
        text,
    )
    assert match
    by_copies, by_copies_mixed, steps, steps_of_one, gains, gain_mixed = match.groups()
    for name in DECODE:
        assert_reads(by_copies, [beside["dp2"][f"{name} decode_tok_s"]], name)
    assert_reads(by_copies_mixed, [beside["dp2"]["mixed_1000 req_s"]], "data parallelism")
    assert_reads(steps, [figure(two[name]) for name in DECODE], "two GPUs")
    assert_reads(steps_of_one, [figure(one[name]) for name in DECODE], "one GPU")
    assert_reads(gains, [beside["tp2"][f"{name} decode_tok_s"] for name in DECODE], "two GPUs beside one")
    assert_reads(gain_mixed, [beside["tp2"]["mixed_1000 req_s"]], "two GPUs beside one")


def test_accuracy() -> None:
    modes = json.loads((RESULTS / "accuracy_h100.json").read_text())["modes"]
    for (label, perplexity, *errors), mode in zip(rows("| SmolLM2-135M-Instruct |"), modes.values(), strict=True):
        assert_reads(perplexity, [mode["perplexity"]], label)
        assert_reads(" ".join(errors), [mode["error"]["rms"], mode["error"]["max"]] if "error" in mode else [], label)
