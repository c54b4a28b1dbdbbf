"""Small GGUF files that hold a tokenizer and no tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

DATA = Path(__file__).parent / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_json(name: str) -> Any:
    """A file of tests/data."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def write_tokenizer(path: Path, **values: Any) -> Path:
    """Writes a GGUF file whose keys are tokenizer.ggml.NAME, or tokenizer.chat_template."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add: Any = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, pre: str, extra: dict[str, int] | None = None, **values: Any) -> Path:
    """Writes byte-level BPE without merges: a token for each byte, "ab", and the extra tokens with their types."""
    letters = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    tokens = [*letters, *(chr(256 + n) for n in range(256 - len(letters))), "ab", *(extra or {})]
    types = [1] * 257 + list((extra or {}).values())
    return write_tokenizer(path, model="gpt2", pre=pre, tokens=tokens, token_type=types, **values)


def write_sentencepiece(path: Path, case: int, **values: Any) -> Path:
    """Writes the vocabulary of sentencepiece_tokens.json with (case 0) or without (1) a space before each text."""
    vocabulary = read_json("sentencepiece_tokens.json")[case]
    return write_tokenizer(
        path,
        model="llama",
        tokens=vocabulary["tokens"],
        scores=vocabulary["scores"],
        token_type=vocabulary["types"],
        bos_token_id=vocabulary["bos_id"],
        eos_token_id=vocabulary["eos_id"],
        unknown_token_id=0,
        add_space_prefix=vocabulary["add_space_prefix"],
        **values,
    )
