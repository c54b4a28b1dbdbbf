"""Makes reference.json: Hugging Face's logits and perplexity in float32, and how far its own bfloat16 is from them, on a CPU.

Needs torch, transformers, accelerate and gguf, so it runs in a venv of its own, from the repository's root (some minutes):
    PYTHONPATH=. python bench/accuracy/make_reference.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.data.make_smollm2_reference import load

HERE = Path(__file__).parent
PROMPTS = HERE.parent.parent / "tests" / "data" / "smollm2_reference.json"
WINDOW, NUM_WINDOWS = 1024, 8
LONG = 256  # tokens of the long prompts, the beginnings of windows
NUM_TOKENS = 4  # positions looked at in each case: the prompt's last, and those of the tokens that follow
NUM_SAMPLED = 256  # entries of the vocabulary whose logits are kept


def load_bfloat16(path: Path) -> Any:
    """As anybody loads it; rope stays in float32."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


@torch.inference_mode()
def continued(model: Any, prompt: list[int], forced: list[int] | None = None) -> tuple[list[int], np.ndarray]:
    """Logits [NUM_TOKENS, V] in float32, computed in the model's own type, of the prompt's last position and of those that follow.

    What follows are the forced tokens, else the likeliest, whether or not they end the text; they are returned too. Each position's
    logits are given less their mean: no probability depends on that.
    """
    ids: list[int] = []
    rows: list[np.ndarray] = []
    inputs, cache = prompt, None
    for i in range(NUM_TOKENS):
        out = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        row = out.logits[0, -1].float().numpy()
        rows.append(row - row.mean())
        ids.append(forced[i] if forced else int(row.argmax()))
        inputs, cache = ids[-1:], out.past_key_values
    return ids, np.stack(rows)


@torch.inference_mode()
def perplexity(model: Any, windows: list[list[int]]) -> float:
    """Over every token of each window but its first."""
    losses = []
    for ids in windows:
        logprobs = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float(), dim=-1)
        losses.append(-logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])])
    return float(torch.cat(losses).double().mean().exp())


def windows_of(tokenizer: Any) -> list[list[int]]:
    """The text's tokens, in windows."""
    ids = tokenizer((HERE / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]
    assert all(len(window) == WINDOW for window in windows)
    return windows


def compared(model: Any, half: Any, windows: list[list[int]]) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """The cases, and the logits [cases, NUM_TOKENS, V] of float32 and of bfloat16."""
    prompts = {case["name"]: case["prompt_ids"] for case in json.loads(PROMPTS.read_text())["cases"]}
    prompts |= {f"text {i}": window[:LONG] for i, window in enumerate(windows[::2])}
    cases, float32, bfloat16 = [], [], []
    for name, prompt in prompts.items():
        ids, logits = continued(model, prompt)
        cases.append({"name": name, "prompt_ids": prompt, "ids": ids})
        float32.append(logits)
        bfloat16.append(continued(half, prompt, ids)[1])
        print(name, float(np.abs(bfloat16[-1] - logits).max()), flush=True)
    return cases, np.stack(float32), np.stack(bfloat16)


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    model, tokenizer = load(path)
    windows = windows_of(tokenizer)
    cases, want, got = compared(model, load_bfloat16(path), windows)
    sampled = np.sort(np.random.default_rng(0).choice(want.shape[-1], NUM_SAMPLED, replace=False))
    for case, logits in zip(cases, want, strict=True):
        case["logits"] = [[round(float(x), 4) for x in row[sampled]] for row in logits]
    error = (got - want).astype(np.float64)
    reference = {
        "file": path.name,
        "torch": torch.__version__,
        "window": WINDOW,
        "num_windows": NUM_WINDOWS,
        "float32": {"perplexity": round(perplexity(model, windows), 4), "logits_std": round(float(want.std()), 4)},
        "bfloat16": {"max": round(float(np.abs(error).max()), 4), "rms": round(float(np.sqrt(np.mean(error**2))), 5)},
    }
    print(json.dumps(reference))
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps(reference | {"vocabulary": sampled.tolist()})[:-1]
    (HERE / "reference.json").write_text(f'{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
