"""Makes beam_reference.json: what Hugging Face's beam search finds on the golden checkpoints and on SmolLM2.

A case counts only where float32 and float64 find the same sequences, so that no near-tie inside the search can decide.
Needs torch, transformers, accelerate and gguf, so it runs in a venv of its own:
    python make_beam_reference.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from make_smollm2_reference import load
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
OUT = HERE / "beam_reference.json"
sys.path.insert(0, str(HERE.parent / "goldens"))
from cases import read_golden, write_checkpoint

CHECKPOINTS = ("llama", "qwen3")
WIDTHS, PENALTIES, EARLY = (3, 4), (0.0, 1.0, 2.0), (True, False, "never")
TEXTS = ("The capital of France is", "Once upon a time, in a land far away, there was a", "def fibonacci(n):\n")


@torch.inference_mode()
def search(model: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a case, best first: output token ids with the stop token, and the score."""
    prompt = torch.tensor([case["prompt_ids"]])
    width = case["width"]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        eos_token_id=case["stop_ids"] or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for ids, score in zip(out.sequences[:, prompt.shape[1] :].tolist(), out.sequences_scores.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(ids) if token in case["stop_ids"]), case["max_tokens"])
        found.append({"ids": ids[:length], "score": round(score, 5)})
    return found


def add(cases: list[dict[str, Any]], model: Any, double: Any, case: dict[str, Any]) -> None:
    """Adds the case with what is found, if precision does not matter."""
    found, again = search(model, case), search(double, case)
    is_stable = [f["ids"] for f in found] == [f["ids"] for f in again]
    ended = sum(f["ids"][-1] in case["stop_ids"] for f in found)
    print({k: v for k, v in case.items() if k != "prompt_ids"}, f"{ended} of {len(found)} stop" if is_stable else "LEFT OUT")
    if is_stable:
        cases.append(case | {"sequences": found})


def golden_cases(name: str) -> list[dict[str, Any]]:
    """One checkpoint, all combinations; prompts, and one or two stop ids that are really hit, take turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / name, name)
        model, double = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
            for dtype in (torch.float32, torch.float64)
        )
    for m in (model, double):
        m.generation_config.eos_token_id = None
    tokens, _ = read_golden(name)
    cases: list[dict[str, Any]] = []
    for i, (width, penalty, early) in enumerate(itertools.product(WIDTHS, PENALTIES, EARLY)):
        case = {
            "model": name, "prompt_ids": tokens[i % 2, : 20 + i].tolist(), "stop_ids": [], "width": width, "max_tokens": 20,
            "length_penalty": penalty, "early_stopping": early,
        }  # fmt: skip
        best = search(model, case)
        stops = sorted({best[0]["ids"][4 + i % 5], best[-1]["ids"][8]} if i % 3 else {best[0]["ids"][6 + i % 7]})
        add(cases, model, double, case | {"stop_ids": stops})
    return cases


def smollm2_cases(path: Path) -> list[dict[str, Any]]:
    model, tokenizer = load(path)
    stop_ids = [model.config.eos_token_id]
    double, _ = load(path)
    double = double.to(torch.float64)
    cases: list[dict[str, Any]] = []
    for text, width in itertools.product(TEXTS, (2, 4)):
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        case = {
            "model": "smollm2", "prompt_ids": prompt_ids, "stop_ids": stop_ids, "width": width, "max_tokens": 24,
            "length_penalty": 1.0, "early_stopping": False,
        }  # fmt: skip
        add(cases, model, double, case)
    return cases


def main() -> None:
    cases = [case for name in CHECKPOINTS for case in golden_cases(name)] + smollm2_cases(Path(sys.argv[1]).resolve())
    OUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
