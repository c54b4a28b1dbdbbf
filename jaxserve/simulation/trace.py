"""TraceRequest: one line of a trace of requests. The fields are those of the traces that Mooncake has published (FAST 2025)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

BLOCK_TOKENS = 512  # prompt tokens that one id stands for, as in Mooncake's traces
MAX_TOKEN_ID = 2**31 - 1
_OWN_TOKENS = 2**30  # token ids from here on are of no shared block

_FIELDS = {"timestamp": float, "input_length": int, "output_length": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """When a request came, and how long it was.

    Attributes:
        timestamp: of the arrival, in milliseconds.
        input_length, output_length: in tokens.
        hash_ids: what the prompt's blocks of BLOCK_TOKENS hold: requests whose first ids are equal begin with the same tokens.
            Prompts without, or beyond their ids, share nothing.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()

    def prompt(self, number: int) -> list[int]:
        """Some token ids of that length; `number` tells requests apart."""
        shared = [hash_id % (_OWN_TOKENS // BLOCK_TOKENS) * BLOCK_TOKENS for hash_id in self.hash_ids]
        ids = [first + i for first in shared for i in range(BLOCK_TOKENS)][: self.input_length]
        # The first token alone makes all that follows another prompt's: a page is found by all that is before it.
        return ids + [_OWN_TOKENS + number % _OWN_TOKENS] * (self.input_length - len(ids))


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a JSONL file, in order of arrival.

    Raises:
        ConfigError: the file cannot be read, or a line is not a request.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    requests = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise ConfigError(f"the trace {path} holds no requests")
    return sorted(requests, key=lambda request: request.timestamp)


def _parse(line: str, where: str) -> TraceRequest:
    wanted = f"{where}: wanted a JSON object with numbers {', '.join(_FIELDS)}, and perhaps hash_ids, a list of whole numbers"
    try:
        found: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{wanted}; {error}") from error
    if not isinstance(found, dict) or not _FIELDS.keys() <= found.keys() <= {*_FIELDS, "hash_ids"}:
        raise ConfigError(f"{wanted}; got {line[:200]}")
    hash_ids = found.get("hash_ids", [])
    numbers = all(type(found[name]) is int or type(found[name]) is kind for name, kind in _FIELDS.items())
    if not numbers or not isinstance(hash_ids, list) or not all(type(i) is int and i >= 0 for i in hash_ids):
        raise ConfigError(f"{wanted}; got {line[:200]}")
    if found["timestamp"] < 0 or found["input_length"] < 1 or found["output_length"] < 1:
        raise ConfigError(f"{where}: a request comes at 0 or later and has at least one token each way; got {line[:200]}")
    return TraceRequest(**found | {"hash_ids": tuple(hash_ids)})
