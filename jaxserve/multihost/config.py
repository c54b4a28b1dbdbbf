"""GroupConfig: which process of a group this is, and where the group meets."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from jaxserve.config import option
from jaxserve.errors import ConfigError

MIN_KEY_LENGTH = 16  # characters; a shorter key could be guessed


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Several hosts that serve one model together, each running one process with the same options."""

    num_processes: int = option(1, "processes, one on each host, that share the model; all wait until all are there")
    process_id: int = option(0, "which of them this is; 0 schedules and serves, the others only compute")
    coordinator: str | None = option(
        None, "HOST:PORT where process 0 is found by the others; it takes this port and the next one (for jax.distributed)"
    )
    group_key_file: str | None = option(
        None, "file with a secret that all processes know; must be given unless --coordinator is this machine itself"
    )

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ConfigError(f"num_processes must be at least 1; got {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process_id must be between 0 and num_processes - 1 = {self.num_processes - 1}; got {self.process_id}"
            )
        if self.num_processes == 1:
            for name in ("coordinator", "group_key_file"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is for several processes; give --num-processes too, or leave it out")
            return
        host, port = self.address
        if not 0 < port < 65535:
            raise ConfigError(f"the port of --coordinator must be between 1 and 65534; got {port}")
        if self.group_key_file is None and not _is_loopback(host):
            raise ConfigError(
                f"other machines can reach {host}: give every process the same secret with --group-key-file "
                "(openssl rand -hex 32 > FILE)"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, colon, port = (self.coordinator or "").rpartition(":")
        if not host or not colon or not port.isdecimal():
            raise ConfigError(f"num_processes={self.num_processes} needs --coordinator HOST:PORT; got {self.coordinator!r}")
        return host.strip("[]"), int(port)

    def read_key(self) -> bytes:
        """The secret; empty without a file.

        Raises:
            ConfigError: the file cannot be read, or the secret is short.
        """
        if self.group_key_file is None:
            return b""
        try:
            key = Path(self.group_key_file).expanduser().read_bytes().strip()
        except OSError as e:
            raise ConfigError(f"cannot read group_key_file {self.group_key_file}: {e.strerror}") from e
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(f"{self.group_key_file} must hold at least {MIN_KEY_LENGTH} characters; it has {len(key)}")
        return key


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
