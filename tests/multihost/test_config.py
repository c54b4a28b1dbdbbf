"""Which options make a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.multihost.config import GroupConfig


def test_one_process_is_no_group() -> None:
    assert GroupConfig().num_processes == 1


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [("127.0.0.1:9000", ("127.0.0.1", 9000)), ("[::1]:9000", ("::1", 9000)), ("localhost:1", ("localhost", 1))],
)
def test_addresses(coordinator: str, address: tuple[str, int]) -> None:
    assert GroupConfig(num_processes=2, coordinator=coordinator).address == address


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_processes": 0}, "at least 1"),
        ({"num_processes": 2, "process_id": 2, "coordinator": "127.0.0.1:9000"}, "between 0 and num_processes - 1 = 1; got 2"),
        ({"process_id": 1}, "between 0 and"),
        ({"coordinator": "127.0.0.1:9000"}, "--num-processes"),
        ({"num_processes": 2}, "HOST:PORT"),
        ({"num_processes": 2, "coordinator": "somewhere"}, "HOST:PORT"),
        ({"num_processes": 2, "coordinator": "127.0.0.1:65535"}, "between 1 and 65534"),
        ({"num_processes": 2, "coordinator": "10.0.0.1:9000"}, "--group-key-file"),
        ({"num_processes": 2, "coordinator": "tpu-0.lan:9000"}, "--group-key-file"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GroupConfig(**options)


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "key"
    config = GroupConfig(num_processes=2, coordinator="10.0.0.1:9000", group_key_file=str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        config.read_key()
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="at least 16"):
        config.read_key()
    path.write_text("0123456789abcdef\n")
    assert config.read_key() == b"0123456789abcdef"
    assert GroupConfig(num_processes=2, coordinator="127.0.0.1:9000").read_key() == b""
