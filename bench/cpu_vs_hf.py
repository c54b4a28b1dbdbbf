"""Tokens a second on the CPU beside Hugging Face transformers' generate: the same SmolLM2 in float32, the same prompts, one run.

usage: python bench/cpu_vs_hf.py --hf-python PYTHON [--threads 2] [--out FILE]

PYTHON is that of a virtual environment with torch and transformers, which jaxserve does not need. Both decode greedily, ignore
end-of-sequence and give every request the same number of tokens. Runs alternate; the best of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 32
BATCHES = (1, 16)
REPEATS = 3

_HF = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
torch.set_num_threads(int(sys.argv[2]))
folder, _, name = sys.argv[1].rpartition("/")
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
for line in sys.stdin:
    work = json.loads(line)
    ids = torch.tensor(work["prompts"])
    n = work["tokens"]
    config = GenerationConfig(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens": out[:, ids.shape[1]:].tolist()}), flush=True)
"""


def prompts_of(batch: int) -> list[list[int]]:
    return np.random.default_rng(batch).integers(1000, 40_000, (batch, PROMPT_TOKENS)).tolist()


class HuggingFace:
    """A process that generates what it is told on its standard input."""

    def __init__(self, python: str, model: str, threads: int) -> None:
        env = {"OMP_NUM_THREADS": str(threads), "PATH": os.environ["PATH"], "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [python, "-c", _HF, model, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def generate(self, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of each prompt."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": OUTPUT_TOKENS}) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return found["seconds"], found["tokens"]

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-python", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # jax takes as many threads as it has cores

    import jax

    from jaxserve import LLM, SamplingParams
    from jaxserve.models.loading.resolve import resolve_model

    other = HuggingFace(args.hf_python, str(resolve_model("smollm2")), args.threads)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=OUTPUT_TOKENS, detokenize=False)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "jax": jax.__version__,
        "threads": args.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "batches": {},
    }
    with LLM("smollm2", max_model_len=512, max_num_batched_tokens=512, enable_prefix_caching=False) as llm:
        for batch in BATCHES:
            prompts = prompts_of(batch)
            ours, theirs = [], []
            for _ in range(REPEATS + 1):
                start = time.perf_counter()
                outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
                ours.append(time.perf_counter() - start)
                seconds, tokens = other.generate(prompts)
                theirs.append(seconds)
            same = np.mean([o.outputs[0].token_ids == t for o, t in zip(outputs, tokens, strict=True)])
            count = batch * OUTPUT_TOKENS
            result["batches"][batch] = {
                "tok_s": round(count / min(ours[1:]), 1),
                "hf_tok_s": round(count / min(theirs[1:]), 1),
                "ratio": round(min(theirs[1:]) / min(ours[1:]), 2),
                "runs_s": [round(s, 2) for s in ours[1:]],
                "hf_runs_s": [round(s, 2) for s in theirs[1:]],
                "same_outputs": float(same),
            }
            print(batch, result["batches"][batch], flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    other.close()


if __name__ == "__main__":
    main()
