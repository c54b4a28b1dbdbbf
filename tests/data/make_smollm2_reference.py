"""Makes smollm2_reference.json: what Hugging Face's float32 Llama says to a few prompts, greedily, from the same GGUF file.

Needs torch, transformers, accelerate and gguf, so it runs in a venv of its own:
    python make_smollm2_reference.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_TOKENS = 48
OUT = Path(__file__).parent / "smollm2_reference.json"


def say(*texts: str) -> list[dict[str, str]]:
    """A conversation: user and assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = {
    "question": say("What is the capital of France?"),
    "system": [{"role": "system", "content": "You are a pirate. Answer in one short sentence."}, *say("Who are you?")],
    "multi_turn": say("I have a cat named Tom.", "Tom sounds lovely! What would you like to know?", "How old can Tom get?"),
    "code": say("Write a Python function that returns the n-th Fibonacci number.\n\n```python\ndef fib(n):\n```"),
    "french": say("Écris une phrase sur la mer, s'il te plaît : où est le château d'Hélène ?"),
    "emoji": say("Explain these: 🎉👩‍🚀🐍 and 日本語 in one line."),
    "numbers": say("Add 1234567 and 89.01, then list 3 primes above 2024."),
    "whitespace": say("  Indented\n\n\ttabs  and   runs of    spaces,\r\nplease repeat.  "),
}
TEXTS = {
    "prose": "Once upon a time, in a land far away, there was a",
    "list": "The planets of the solar system are:\n1. Mercury\n2.",
    "source": "import math\n\nclass Circle:\n    def __init__(self, radius):\n        self.radius = radius\n\n    def area(self):\n",
    "single": "Hello",
}


def load(path: Path) -> tuple[Any, Any]:
    """The model with all weights expanded to float32, and the tokenizer, both checked against the file's own metadata."""
    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        return fields[key].contents()

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = model.config
    assert config.model_type == value("general.architecture") == "llama"
    assert config.rope_parameters["rope_theta"] == value("llama.rope.freq_base") == 100_000
    assert config.rope_parameters["rope_type"] == "default"
    assert abs(config.rms_norm_eps - value("llama.attention.layer_norm_rms_epsilon")) < 1e-12
    assert config.num_hidden_layers == value("llama.block_count")
    assert config.num_attention_heads == value("llama.attention.head_count")
    assert config.num_key_value_heads == value("llama.attention.head_count_kv")
    assert config.head_dim == value("llama.rope.dimension_count")
    assert config.hidden_act == "silu" and not config.attention_bias and not config.mlp_bias
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # the file has no output.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers reads this file as plain GPT-2, which keeps digits together; SmolLM2 was trained on single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


@torch.inference_mode()
def greedy(model: Any, prompt_ids: list[int], eos_id: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens, up to and with end-of-sequence, and by how much each one's logit leads the second best."""
    ids: list[int] = []
    gaps: list[float] = []
    inputs, cache = torch.tensor([prompt_ids]), None
    while len(ids) < NUM_TOKENS and eos_id not in ids:
        out = model(inputs, past_key_values=cache, use_cache=True)
        top = out.logits[0, -1].topk(2)
        ids.append(int(top.indices[0]))
        gaps.append(round(float(top.values[0] - top.values[1]), 4))
        inputs, cache = top.indices[:1][None], out.past_key_values
    # The same again without a cache: one pass over everything must choose the same tokens.
    logits = model(torch.tensor([prompt_ids + ids[:-1]]), use_cache=False).logits[0, len(prompt_ids) - 1 :]
    again = logits.argmax(-1).tolist()
    assert all(a == b or gap < 0.001 for a, b, gap in zip(again, ids, gaps, strict=True))
    return ids, gaps


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    model, tokenizer = load(path)
    eos_id = model.config.eos_token_id
    cases = []
    for name, prompt in (CHATS | TEXTS).items():
        is_chat = name in CHATS
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if is_chat else prompt
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, gaps = greedy(model, prompt_ids, eos_id)
        case = {"name": name, "messages": prompt if is_chat else None, "prompt": None if is_chat else prompt}
        case |= {"prompt_ids": prompt_ids, "ids": ids, "gaps": gaps}
        cases.append(case | {"text": tokenizer.decode(ids, skip_special_tokens=True)})
        print(f"{name}: {len(prompt_ids)} + {len(ids)} tokens, least gap {min(gaps)}: {cases[-1]['text']!r}")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    head = json.dumps({"file": path.name, "eos_id": eos_id, "max_tokens": NUM_TOKENS})[:-1]
    OUT.write_text(f'{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
