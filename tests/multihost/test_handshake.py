"""Who may join a group, and what the others are told."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.multihost import leader
from jaxserve.multihost.config import GroupConfig
from jaxserve.multihost.handshake import ask_to_join
from jaxserve.multihost.leader import Leader, gather
from jaxserve.multihost.wire import ChannelError, Message
from jaxserve.multihost.worker import join
from tests.multihost.pairs import InThread, channels, free_port

IDENTITY: dict[str, Any] = {"versions": {"jax": "1"}, "source": "s", "options": {"max_num_seqs": 4}, "model": "m"}


class Group:
    """Process 0 of a group of three, and ways to come to it."""

    def __init__(self, key_file: Path) -> None:
        self.options: dict[str, Any] = {"num_processes": 3, "coordinator": f"127.0.0.1:{free_port()}"}
        self.key = {"group_key_file": str(key_file)}
        self.gathering = InThread(gather, GroupConfig(**self.options, **self.key), IDENTITY, 20)

    def join(self, process_id: int = 1, identity: dict[str, Any] = IDENTITY, **changes: Any) -> Any:
        config = GroupConfig(**(self.options | self.key | {"process_id": process_id} | changes))
        return join(config, identity, 20)

    def complete(self, *process_ids: int) -> None:
        """The others come, and the group is whole."""
        for process_id in process_ids:
            self.join(process_id)
        found: Leader = self.gathering.result()
        found.end()


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    monkeypatch.setattr(leader, "HANDSHAKE_S", 0.3)
    key_file = tmp_path / "key"
    key_file.write_text("a secret of the group")
    return Group(key_file)


def test_all_come_in_any_order(group: Group) -> None:
    group.complete(2, 1)


def test_another_key(group: Group, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other"
    other.write_text("a secret of somebody else")
    for changes in ({"group_key_file": str(other)}, {"group_key_file": None}):
        with pytest.raises(ConfigError, match="refuses process 1: its group key is another"):
            group.join(**changes)
    group.complete(1, 2)
    assert "refused 127.0.0.1: it does not know the group key" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"versions": {"jax": "2"}}, "another version: jax '2' where process 0 has '1'"),
        ({"options": {"max_num_seqs": 8}}, "another config: max_num_seqs 8 where process 0 has 4"),
        ({"source": "t"}, "another source"),
        ({"model": "n"}, "another model"),
    ],
)
def test_another_identity(group: Group, change: dict[str, Any], text: str) -> None:
    """Refused, and the group still comes together."""
    with pytest.raises(ConfigError, match=text):
        group.join(identity=IDENTITY | change)
    group.complete(1, 2)


def test_the_same_process_twice(group: Group) -> None:
    group.join(1)
    with pytest.raises(ConfigError, match="there is a process 1 already"):
        group.join(1)
    with pytest.raises(ConfigError, match="between 1 and 2"):
        group.join(3, num_processes=4)
    group.complete(2)


def test_strangers_do_not_end_it(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody who says nothing, a browser, and half a process."""
    address = GroupConfig(**group.options, **group.key).address
    group.join(1)  # it listens
    silent = socket.create_connection(address)
    browser = socket.create_connection(address)
    browser.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
    odd = socket.create_connection(address)
    odd.close()
    group.complete(2)
    assert "silent for 0.3 seconds" in caplog.text and "does not speak" in caplog.text
    silent.close()
    browser.close()


def test_a_false_leader_is_found_out() -> None:
    """Somebody who cannot prove that he knows the key gets a worker neither to start nor to believe him."""
    mine, his = channels()
    joining = InThread(ask_to_join, mine, b"the group's key", IDENTITY, 1)
    his.send(Message("challenge", {"nonce": "0" * 32}))
    hello = his.receive()
    assert b"the group's key" not in json.dumps(hello.fields).encode()
    his.send(Message("welcome", {"proof": hello.fields["proof"]}))
    with pytest.raises(ConfigError, match="does not know the group key"):
        joining.result()


def test_nobody_comes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = GroupConfig(num_processes=3, coordinator=f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"processes \[1, 2\] of the group have not come within 0\.1 seconds"):
        gather(config, IDENTITY, 0.1)
    with pytest.raises(ConfigError, match=r"no process 0 at 127\.0\.0\.1:\d+ within 0 seconds"):
        join(GroupConfig(num_processes=3, process_id=1, coordinator=config.coordinator), IDENTITY, 0)


def test_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = GroupConfig(num_processes=2, coordinator=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match="Address already in use"):
            gather(config, IDENTITY, 1)


def test_a_leader_that_goes_before_it_answers() -> None:
    mine, his = channels()
    his.close()
    with pytest.raises(ChannelError):
        ask_to_join(mine, b"", IDENTITY, 1)
