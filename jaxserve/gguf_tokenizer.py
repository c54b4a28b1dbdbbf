"""Builds a tokenizer from the metadata of a GGUF file. Knows llama.cpp's names for tokenizers, and nothing of the file itself.

Key names and meanings: the GGUF specification. Split patterns: those that llama.cpp runs for each `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import ModelLoadError

_WAY_OUT = "Give --tokenizer a folder with the model's tokenizer.json."
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARK = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_MARK}{_UPPER}*{_LOWER}+|{_MARK}{_UPPER}+{_LOWER}*|\p{{N}}{_CASED_TAIL}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = rf"{_MARK}{_UPPER}*{_LOWER}+{_SUFFIX}|{_MARK}{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}{_CASED_TAIL}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "dbrx", "smaug-bpe", "glm4"), (_LLAMA3,)
    ),
    "chatglm-bpe": (_LLAMA3,),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), (_GPT4O,)),
}
"""Split patterns by pre-tokenizer name, applied one after another: each cuts the pieces that the ones before it left."""

_NFC = frozenset({"qwen2", "qwen35"})
"""The pre-tokenizers of models that were trained on composed text; a GGUF file does not say so."""

_WHOLE_WORDS = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"))
"""Here a piece that is a token stays whole, even where the merges would not build it; llama.cpp adds BOS unless told not to."""

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")
"""How chat models spell the end of their turn, for files that name only the end of the text."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says about its tokenizer.

    Attributes:
        backend: turns text into ids and back.
        special_tokens: bos_token, eos_token, unk_token and pad_token, as far as the file has them.
        end_ids: the ids that end a completion.
    """

    backend: Tokenizer
    chat_template: str | None
    special_tokens: dict[str, str]
    end_ids: tuple[int, ...]


def build_tokenizer(metadata: Mapping[str, Any], name: str) -> GgufTokenizer:
    """Builds the tokenizer that a GGUF file's metadata describes.

    Args:
        metadata: the header's key-value pairs.
        name: the file, for error texts.

    Raises:
        ModelLoadError: the metadata are broken, or the tokenizer is of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(f"{name}: its tokenizer.ggml.model is {kind!r}; supported are gpt2 and llama. {_WAY_OUT}")
    tokens: Sequence[str] = metadata.get("tokenizer.ggml.tokens") or ()
    types: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise ModelLoadError(f"{name}: it has {len(tokens):,} tokens and {len(types):,} token types; the file is broken.")
    try:
        backend = _byte_level_bpe(metadata, tokens) if kind == "gpt2" else _sentencepiece_bpe(metadata, tokens, types)
    except Exception as error:  # tokenizers has no exceptions of its own
        raise ModelLoadError(f"{name}: its tokenizer cannot be built: {error}. {_WAY_OUT}") from error
    for token_type in (TokenType.CONTROL, TokenType.USER_DEFINED):
        is_special = token_type == TokenType.CONTROL
        found = (token for token, t in zip(tokens, types, strict=True) if t == token_type)
        backend.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in found])
    special_ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in _SPECIAL.items()}
    special = {key: i for key, i in special_ids.items() if i is not None and i < len(tokens)}
    backend.post_processor = _bos_and_eos(metadata, tokens, special)
    return GgufTokenizer(
        backend=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={key: tokens[i] for key, i in special.items()},
        end_ids=_end_ids(metadata, tokens),
    )


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise ValueError(f"its tokenizer.ggml.pre is {pre!r}, and supported are {', '.join(sorted(_SPLITS))}")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _stored_merges(metadata, vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE: text is one run with "▁" for spaces, and the pair that makes the best-scored token merges first."""
    scores: Sequence[float] = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    unknown = next((token for token, t in zip(tokens, types, strict=True) if t == TokenType.UNKNOWN), None)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _stored_merges(metadata, vocab) or _merges_from_scores(tokens, scores, types)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=TokenType.BYTE in types)
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    decode: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(decode)
    return backend


def _merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score first."""
    ranked = sorted((i for i, t in enumerate(types) if t == TokenType.NORMAL), key=lambda i: (-scores[i], i))
    id_of = {tokens[i]: i for i in ranked}
    merges: list[tuple[str, str]] = []
    for token in id_of:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in id_of and token[at:] in id_of]
        merges += cuts if len(cuts) < 2 else sorted(cuts, key=lambda cut: (id_of[cut[0]], id_of[cut[1]]))
    return merges


def _stored_merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges") or ():
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):  # tokenizers would panic
            raise ValueError(f"its merge {merge!r} joins or makes what is no token")
        merges.append((left, right))
    return merges


def _bos_and_eos(metadata: Mapping[str, Any], tokens: Sequence[str], special: Mapping[str, int]) -> processors.PostProcessor:
    """Puts begin- and end-of-sequence around a text where the file, or its kind's habit, says so."""
    by_habit = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", by_habit),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    added = {key: (tokens[special[key]], special[key]) for key, is_wanted in wanted.items() if is_wanted and key in special}
    before, after = ([added[key][0]] if key in added else [] for key in wanted)
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=list(added.values()))


def _end_ids(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[int, ...]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = [metadata[key] for key in keys if key in metadata]
    if "tokenizer.ggml.eot_token_id" not in metadata:
        ids += [tokens.index(token) for token in _END_OF_TURN if token in tokens]
    return tuple(dict.fromkeys(ids))
