"""How right the numbers are: SmolLM2 in float32, bfloat16, 8-bit weights and 8-bit pages, beside Hugging Face's own bfloat16.

usage: python bench/accuracy/measure.py MODEL [--out FILE] [--modes float32 bfloat16 ...] [--jobs 5] [--windows 8]

For each mode the perplexity of text.txt, in windows of 1,024 tokens, and the error of the logits against float32 on the same
device, at 4 positions of 16 prompts: the first is prefill's, the others are decode's. What Hugging Face gives is in
reference.json; float32 is held against its float32. Each mode is a process of its own; on a GPU of much memory several may run
at once (--jobs, with XLA_PYTHON_CLIENT_PREALLOCATE=false).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
REFERENCE: dict[str, Any] = json.loads((HERE / "reference.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = REFERENCE["cases"]
MODES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "8-bit weights": {"dtype": "bfloat16", "quantization": "fp8"},
    "8-bit pages": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "8-bit weights and pages": {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8"},
}
LENGTH = REFERENCE["window"] + 16
SIZES = {"max_model_len": LENGTH, "max_num_seqs": 64, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 640}


def windows_of(model: str, count: int) -> list[list[int]]:
    """The text's tokens, in windows, the first `count` of them."""
    from jaxserve.models.loading.resolve import resolve_model
    from jaxserve.tokenizer import load_tokenizer

    ids = load_tokenizer(resolve_model(model)).encode((HERE / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False)
    size = REFERENCE["window"]
    return [ids[i * size : (i + 1) * size] for i in range(count)]


def run_mode(model: str, mode: str, folder: Path, windows: int) -> None:
    """One mode, in the process that is there for it: writes figures.json and logits.npy, [cases, positions, V], to the folder.

    Positions after the first token that is not the reference's are NaN: what follows is another text.
    """
    began_s = time.perf_counter()
    import jax

    from jaxserve import LLM, SamplingParams

    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **SIZES, **MODES[mode]}
    with LLM(model, **options) as llm:
        ready_s = time.perf_counter() - began_s
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in windows_of(model, windows)], params, use_tqdm=False)
        logprobs = [
            found[token].logprob
            for output in outputs
            for token, found in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
            if found is not None
        ]
        count = len(CASES[0]["ids"])
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=-1, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": case["prompt_ids"]} for case in CASES], params, use_tqdm=False)
        logits = np.full((len(CASES), count, llm.engine.vocab_size), np.nan, np.float32)
        for rows, case, output in zip(logits, CASES, outputs, strict=True):
            completion = output.outputs[0]
            for position, found in enumerate(completion.logprobs or ()):
                if completion.token_ids[:position] == case["ids"][:position]:
                    rows[position, list(found)] = [entry.logprob for entry in found.values()]
    np.save(folder / "logits.npy", logits - logits.mean(axis=-1, keepdims=True))
    figures = {
        "perplexity": float(np.exp(-np.mean(logprobs, dtype=np.float64))),
        "tokens": len(logprobs),
        "ready_s": round(ready_s, 1),
        "seconds": round(time.perf_counter() - began_s, 1),
        "device": jax.devices()[0].device_kind,
    }
    (folder / "figures.json").write_text(json.dumps(figures))


def error_of(got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    """Largest and root-mean-square difference, where both are numbers, and the positions that this leaves."""
    difference = (got - want).astype(np.float64)
    seen = ~np.isnan(difference).any(axis=-1)
    difference = difference[seen]
    return {
        "max": round(float(np.abs(difference).max()), 5),
        "rms": round(float(np.sqrt(np.mean(difference**2))), 5),
        "positions": int(seen.sum()),
    }


def measure(model: str, modes: list[str], jobs: int, windows: int) -> dict[str, Any]:
    """Figures by mode."""
    with tempfile.TemporaryDirectory() as name:
        folders = {mode: Path(name) / str(i) for i, mode in enumerate(modes)}

        def start(mode: str) -> None:
            folders[mode].mkdir()
            command = [sys.executable, __file__, model, "--windows", str(windows), "--child", mode, str(folders[mode])]
            subprocess.run(command, check=True)
            print(mode, (folders[mode] / "figures.json").read_text(), file=sys.stderr, flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(start, modes))
        figures = {mode: json.loads((folder / "figures.json").read_text()) for mode, folder in folders.items()}
        logits = {mode: np.load(folder / "logits.npy") for mode, folder in folders.items()}
    published = np.array([case["logits"] for case in CASES])
    for mode in modes:
        sampled = logits[mode][..., REFERENCE["vocabulary"]]
        figures[mode]["error_against_hf_float32"] = error_of(sampled, published)
        if "float32" in logits and mode != "float32":
            figures[mode]["error"] = error_of(logits[mode], logits["float32"])
    return figures


def table(figures: dict[str, Any]) -> str:
    """Markdown, Hugging Face's rows last."""
    lines = ["| SmolLM2-135M-Instruct | perplexity | logits' error: rms | largest |", "|---|---|---|---|"]
    for mode, found in figures.items():
        error = found.get("error") or found["error_against_hf_float32"]
        name = mode if "error" in found else f"{mode}, against Hugging Face's float32"
        lines.append(f"| {name} | {found['perplexity']:.4f} | {error['rms']:.5f} | {error['max']:.4f} |")
    theirs = REFERENCE["bfloat16"]
    lines.append(f"| Hugging Face float32 (CPU) | {REFERENCE['float32']['perplexity']:.4f} | | |")
    lines.append(f"| Hugging Face bfloat16 (CPU) | | {theirs['rms']:.5f} | {theirs['max']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--jobs", type=int, default=1, help="modes at once")
    parser.add_argument("--windows", type=int, default=REFERENCE["num_windows"], help="of the text, to be quick")
    parser.add_argument("--child", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_mode(args.model, args.child[0], Path(args.child[1]), args.windows)
        return
    began_s = time.perf_counter()
    figures = measure(args.model, args.modes, args.jobs, args.windows)
    theirs = {name: REFERENCE[name] for name in ("float32", "bfloat16")}
    result: dict[str, Any] = {
        "device": next(iter(figures.values()))["device"],
        "seconds": round(time.perf_counter() - began_s, 1),
        "modes": figures,
        "hugging_face_cpu": theirs,
    }
    if error := figures.get("bfloat16", {}).get("error"):
        result["bfloat16_error_over_hugging_face"] = {k: round(error[k] / theirs["bfloat16"][k], 3) for k in ("max", "rms")}
    print(table(figures))
    print("bfloat16's error over Hugging Face's (aim: at most 2):", result.get("bfloat16_error_over_hugging_face"))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
