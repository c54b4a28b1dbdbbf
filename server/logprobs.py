"""Logprobs in OpenAI's two shapes: the chat endpoint's list of tokens, the completions endpoint's parallel lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def chat_logprobs(completion: CompletionOutput, tokenizer: Tokenizer | None, num_top: int) -> dict[str, Any]:
    """{"content": one entry for each token, with its `num_top` likeliest rivals}."""
    content = []
    for token_id, position in zip(completion.token_ids, completion.logprobs or (), strict=True):
        entry = _chat_entry(token_id, position[token_id], tokenizer)
        entry["top_logprobs"] = [
            _chat_entry(i, logprob, tokenizer) for i, logprob in _likeliest(position) if logprob.rank <= num_top
        ]
        content.append(entry)
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs | None],
    tokenizer: Tokenizer | None,
    text_offset: int,
    num_top: int,
) -> tuple[dict[str, Any], int]:
    """Four parallel lists, and where the next token's text begins.

    Args:
        positions: one for each token; None for a prompt's first, which nothing predicts.
        text_offset: characters before the first token.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for token_id, position in zip(token_ids, positions, strict=True):
        text = _token_text(token_id, position[token_id] if position else None, tokenizer)
        tokens.append(text)
        logprobs.append(_finite(position[token_id]) if position else None)
        tops.append(_by_text(position, token_id, tokenizer, num_top) if position else None)
        offsets.append(text_offset)
        text_offset += len(text)
    lists = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
    return lists, text_offset


def prompt_logprobs(output: RequestOutput, num_top: int, tokenizer: Tokenizer | None) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token, token id -> its log probability, for that token and the likeliest ones."""
    positions: list[dict[str, Any] | None] = []
    for token_id, position in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True):
        shown = None
        if position is not None:
            shown = {
                str(i): {"logprob": _finite(p), "rank": p.rank, "decoded_token": _token_text(i, p, tokenizer)}
                for i, p in _likeliest(position)
                if p.rank <= num_top or i == token_id
            }
        positions.append(shown)
    return positions


def _by_text(position: TokenLogprobs, own: int, tokenizer: Tokenizer | None, num_top: int) -> dict[str, float]:
    """Text -> log probability, for the token itself and the likeliest ones; of tokens with the same text, the likeliest."""
    top: dict[str, float] = {}
    for token_id, logprob in _likeliest(position):
        if logprob.rank <= num_top or token_id == own:
            top.setdefault(_token_text(token_id, logprob, tokenizer), _finite(logprob))
    return top


def _likeliest(position: TokenLogprobs) -> list[tuple[int, Logprob]]:
    return sorted(position.items(), key=lambda item: item[1].rank)


def _chat_entry(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "token": _token_text(token_id, logprob, tokenizer),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)) if tokenizer else None,
    }


def _token_text(token_id: int, logprob: Logprob | None, tokenizer: Tokenizer | None) -> str:
    if logprob is not None and logprob.decoded_token is not None:
        return logprob.decoded_token
    return tokenizer.token_text(token_id) if tokenizer else f"token_id:{token_id}"


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, MIN_LOGPROB)
