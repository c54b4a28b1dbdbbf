"""Makes the reference cases: for each, a tiny random checkpoint and the logits that Hugging Face transformers computes for it.

Needs torch, which the project itself never installs, so it runs in a virtual environment of its own:

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch transformers safetensors
    /tmp/torch/bin/python tests/goldens/make_goldens.py [case ...]        # no names: all of them

tests/goldens/CASE then holds
    config.json   what the checkpoint's config.json says
    tensors.json  the shape of every tensor with two or more axes; its values are draw(name, shape)
    small.npz     the values of all other tensors
    golden.npz    tokens int32 [2, 48] and logits float16 [2, 48, V] (float32 arithmetic, eager attention)
so a case takes some 30 KB, and cases.py writes model.safetensors again with numpy alone.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import dense_cases
import moe_cases
import recurrent_cases
from cases import FOLDER, draw

SEED = 0
PROMPTS, LENGTH = 2, 48

BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24, "num_hidden_layers": 7, "tie_word_embeddings": True}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

# case -> (model_type, what differs from BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama2": ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama_bias": (
        "llama",
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": 16, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3_text": ("gemma3_text", GEMMA3),
    "gemma3_linear": ("gemma3_text", GEMMA3 | {"rope_parameters": GEMMA3_ROPE, "final_logit_softcapping": 4.0}),
}


CLASSES = {"mistral4": "Mistral4ForCausalLM"}  # that transformers' AutoModelForCausalLM does not know
ATTENTION = {"falcon_alibi": "sdpa"}  # transformers' eager attention adds ALiBi twice in Falcon

CASES |= dense_cases.CASES | moe_cases.CASES | recurrent_cases.CASES


CONSTANT = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # buffers that follow from the config


def _values(name: str, made: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a tensor is set to, given what transformers made of it."""
    if name.endswith(CONSTANT):
        return made
    return draw(name, made.shape) if made.ndim >= 2 else made + 0.1 * rng.standard_normal(made.shape)


def make(case: str) -> float:
    """Writes the files of one case; returns the spread of its logits."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[case]
    out = FOLDER / case
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        kind = type(AutoConfig.for_model(model_type))  # GPT-2 and others have other names for some of BASE's fields
        known = kind.__dataclass_fields__.keys() - kind.attribute_map
        fields = {name: value for name, value in BASE.items() if name in known} | fields
        config = AutoConfig.for_model(model_type, **fields)
        auto = getattr(transformers, CLASSES[case]) if case in CLASSES else AutoModelForCausalLM
        made = auto(config) if case in CLASSES else auto.from_config(config, dtype=torch.float32)
        made.save_pretrained(scratch)
        file = Path(scratch) / "model.safetensors"
        tensors = {n: _values(n, v, rng) for n, v in load_file(file).items()}
        tensors = {n: np.asarray(v, np.float32) for n, v in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        model, info = auto.from_pretrained(
            scratch, attn_implementation=ATTENTION.get(case, "eager"), dtype=torch.float32, output_loading_info=True
        )
        shutil.copy(Path(scratch) / "config.json", out / "config.json")
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokens = np.random.default_rng(SEED + 1).integers(3, model.config.vocab_size, (PROMPTS, LENGTH))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
    assert np.isfinite(logits).all() and logits.std() > 0.05, f"{case}: the logits say nothing, std {logits.std()}"
    shapes = {n: list(v.shape) for n, v in sorted(tensors.items()) if v.ndim >= 2 and not n.endswith(CONSTANT)}
    (out / "tensors.json").write_text(json.dumps(shapes, indent=0) + "\n")
    np.savez_compressed(out / "small.npz", **{n: v for n, v in tensors.items() if v.ndim < 2 or n.endswith(CONSTANT)})
    np.savez_compressed(out / "golden.npz", tokens=tokens.astype(np.int32), logits=logits.astype(np.float16))
    return float(logits.std())


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(f"{name}: logits std {make(name):.3f}", flush=True)
