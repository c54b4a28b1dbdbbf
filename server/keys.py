"""ApiKeys: who may use the server. Knows hashes of keys, and no key once it has started."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig

MIN_LENGTH = 16  # characters; a shorter key could be guessed
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64}) sha256:(?P<digest>[0-9a-f]{64})(?P<admin> admin)?")


@dataclass(frozen=True)
class Key:
    """One key, by its hash. Keys are long and random, so that a plain SHA-256 cannot be turned back.

    Attributes:
        name: whose it is; prompts, stored responses and rates are kept apart by it.
        is_admin: whether it opens the operator's routes, too.
    """

    name: str
    digest: bytes
    is_admin: bool

    @property
    def line(self) -> str:
        """The key's line in a file of keys."""
        return f"{self.name} sha256:{self.digest.hex()}{' admin' if self.is_admin else ''}"


class ApiKeys:
    """The keys that are accepted."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def from_config(cls, config: ServerConfig) -> Self:
        """The keys of the file, and the one that was given as such, which is the operator's.

        Raises:
            ConfigError: the file cannot be read or has a malformed line, or a key is too short.
        """
        keys = _read(Path(config.api_key_file).expanduser()) if config.api_key_file is not None else []
        if (own := config.single_key) is not None:
            if len(own) < MIN_LENGTH or not own.isascii() or not own.isprintable() or " " in own:
                raise ConfigError(
                    f"the API key must have at least {MIN_LENGTH} printable ASCII characters and no space; "
                    "`jaxserve new-key NAME` makes a good one"
                )
            keys.append(Key("operator", _digest(own), is_admin=True))
        if len({key.name for key in keys}) < len(keys):
            raise ConfigError("two API keys have the same name; give each its own")
        return cls(keys)

    def find(self, text: str) -> Key | None:
        """The key that a client has sent. Takes as long for a wrong one as for a right one."""
        digest = _digest(text)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def new_key(name: str, is_admin: bool) -> tuple[str, Key]:
    """A random key, and what a file of keys holds of it.

    Raises:
        ConfigError: the name has other characters than letters, digits and ._@-
    """
    text = f"js-{secrets.token_urlsafe(32)}"
    key = Key(name, _digest(text), is_admin)
    if not _LINE.fullmatch(key.line):
        raise ConfigError(f"a key's name has 1 to 64 letters, digits or ._@-; got {name!r}")
    return text, key


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _read(path: Path) -> list[Key]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read --api-key-file {path}: {getattr(e, 'strerror', None) or e}") from e
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:  # the line itself stays unsaid: it may be a key
            raise ConfigError(
                f"{path}, line {number} must be `NAME sha256:HEX` or `NAME sha256:HEX admin`, as `jaxserve new-key` prints"
            )
        keys.append(Key(match["name"], bytes.fromhex(match["digest"]), match["admin"] is not None))
    if not keys:
        raise ConfigError(f"{path} holds no key; `jaxserve new-key NAME` makes one")
    return keys
