"""Makes smollm2_tokens.json: the ids of varied texts, by byte-level BPE written out in plain Python.

SmolLM2's tokenizer cuts a text at control tokens, then at each digit, then by GPT-2's pattern, and merges the bytes of each piece.
Needs gguf and regex: python make_smollm2_tokens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import regex
from gguf import GGUFReader

OUT = Path(__file__).parent / "smollm2_tokens.json"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog. It's what they'd've done, isn't it?",
    "IT'S shouting; I'LL STOP",
    "0 12 345 6789 10^23 3.14159 1,000,000 v2.0.1 x86_64",
    "digits²³ ½ Ⅷ ٣٤ 五",
    "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)  # O(2**n)\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "<html><body class='x'>&nbsp;</body></html>",
    "  two leading,   three inside,\ttab,\n\n\ntriple newline, trailing   ",
    "\r\nWindows\r\nlines\r\n",
    "\u00a0no-break\u2003em\u3000wide\u200bzero",
    "Où est le château d'Hélène ? Ça coûte 12,50 €.",
    "e\u0301 decomposed, \u00e9 composed",
    "Привет, мир! Γειά σου Κόσμε",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "مرحبا بالعالم שלום עולם",
    "emoji 😀🎉 👩‍🚀 🇫🇷 ❤️ end",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "spelled < |im_end| > and <|im_end and im_end|>",
    "<file_sep><repo_name>a/b<|endoftext|> after",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "---- ==== //// \\\\\\\\ ....",
    "CamelCaseIdentifier snake_case_name kebab-case SCREAMING_CASE",
    "\x00\x01\x7f control characters",
]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, extra = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else extra))
        extra += byte not in printable
    return letters


def merge(piece: str, ranks: dict[tuple[str, str], int], letters: list[str]) -> list[str]:
    """Joins the pair of the lowest rank, everywhere, until no pair has one."""
    parts = [letters[byte] for byte in piece.encode()]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(parts):
            both = tuple(parts[i : i + 2]) == best
            joined.append("".join(best) if both else parts[i])
            i += 2 if both else 1
        parts = joined
    return parts


def main() -> None:
    fields = GGUFReader(Path(sys.argv[1])).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(fields["tokenizer.ggml.merges"].contents())}
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True) if kind == 3]
    is_control = "|".join(map(regex.escape, control))
    letters = byte_letters()
    cases = []
    for text in TEXTS:
        out = []
        for section in regex.split(f"({is_control})", text):
            if section in control:
                out.append(ids[section])
                continue
            for span in regex.split(r"(\p{N})", section):
                for piece in regex.findall(GPT2, span):
                    out += [ids[part] for part in merge(piece, ranks, letters)]
        cases.append({"text": text, "ids": out})
    OUT.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
