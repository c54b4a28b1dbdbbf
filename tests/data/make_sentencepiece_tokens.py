"""Makes sentencepiece_tokens.json: a small BPE vocabulary with byte tokens, and what SentencePiece itself encodes with it.

Needs sentencepiece, so it runs in a venv of its own: python make_sentencepiece_tokens.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece as spm

HERE = Path(__file__).parent
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "runs   of    spaces",
    "lines\nand\n\n\ttabs",
    "the theatre there, then the other",
    "1234567890 and 3.14",
    "naïve café – “quoted”",
    "日本語 😀 emoji 👩‍🚀",
    "a" * 40,
    "=== == = ====",
    "<unk> is <0x41> text",
    "def f(x):\n    return x + 1\n",
    "one<sep>two <sep> three",
]


def train(add_dummy_prefix: bool) -> spm.SentencePieceProcessor:
    """Learns a vocabulary of Llama's kind from this file and its neighbour."""
    lines = [line for path in sorted(HERE.glob("make_*.py")) for line in path.read_text().splitlines()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=[] if add_dummy_prefix else ["<sep>"],
        control_symbols=["<turn>"],
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def token_type(sp: spm.SentencePieceProcessor, i: int) -> int:
    """GGUF's number for the kind of a piece."""
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    number = next((number for is_kind, number in kinds if is_kind(i)), 1)
    return 4 if sp.id_to_piece(i) == "<sep>" else number


def main() -> None:
    cases = []
    for add_dummy_prefix in (True, False):
        sp = train(add_dummy_prefix)
        types = [token_type(sp, i) for i in range(len(sp))]
        cases.append(
            {
                "add_space_prefix": add_dummy_prefix,
                "tokens": [sp.id_to_piece(i) for i in range(len(sp))],
                "scores": [sp.get_score(i) for i in range(len(sp))],
                "types": types,
                "bos_id": sp.bos_id(),
                "eos_id": sp.eos_id(),
                "texts": [{"text": text, "ids": sp.encode(text), "decoded": sp.decode(sp.encode(text))} for text in TEXTS],
            }
        )
    (HERE / "sentencepiece_tokens.json").write_text(json.dumps(cases, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
