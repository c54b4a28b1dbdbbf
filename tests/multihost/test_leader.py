"""When a group ends, and who is told why."""

from __future__ import annotations

import re

import pytest

from jaxserve.errors import ConfigError, EngineDeadError
from jaxserve.multihost import leader as leader_module
from jaxserve.multihost import worker as worker_module
from jaxserve.multihost.leader import Leader
from jaxserve.multihost.wire import Message
from jaxserve.multihost.worker import Worker
from tests.multihost.pairs import InThread, channels
from tests.server.conftest import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit; see conftest.py

BUILT = {"KV pool": "7 pages", "dtype": "float32"}


class Pair:
    """Process 0 and the connection of another one."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        mine, self.other_end = channels()
        self.leader = Leader({1: mine})
        self.leader.on_failure(self.reasons.append)

    def worker(self) -> Worker:
        return Worker(self.other_end, 1)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(leader_module, "BEAT_S", 0.02)
    monkeypatch.setattr(worker_module, "BEAT_S", 0.02)
    return Pair()


def serving(pair: Pair) -> Worker:
    worker = pair.worker()
    pair.leader.start_together()
    worker.wait_for_start()
    ready = InThread(worker.wait_for_service, BUILT)
    pair.leader.wait_until_ready(BUILT)
    ready.result()
    return worker


def test_a_worker_that_dies(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    serving(pair)
    pair.other_end._sock.shutdown(2)
    wait_for(lambda: pair.reasons)
    assert re.match("process 1 of the group has gone: .+", pair.reasons[0])
    with pytest.raises(EngineDeadError, match="process 1 of the group has gone"):
        pair.leader.broadcast(Message("run"))
    assert pair.reasons == pair.reasons[:1] and pair.leader.wait_for_cause(0) == pair.reasons[0]


def test_a_host_that_falls_silent(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Nothing closes the connection of a machine without power."""
    monkeypatch.setattr(worker_module, "BEAT_S", 1000)
    monkeypatch.setattr(leader_module, "SILENT_S", 0.1)
    mine, other = channels()
    pair.leader = Leader({1: mine})
    pair.leader.on_failure(pair.reasons.append)
    other.send(Message("ready", dict(BUILT)))
    pair.leader.wait_until_ready(BUILT)
    other.send(Message("beat"))  # the wait before this one still had the longer time
    wait_for(lambda: pair.reasons)
    assert pair.reasons == ["process 1 of the group has gone: it has been silent for 0.1 seconds"]


def test_a_worker_that_fails_says_why(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    worker = serving(pair)
    with pytest.raises(SystemExit):
        worker.fail("ValueError: no")
    wait_for(lambda: pair.reasons)
    assert pair.reasons == ["process 1 of the group has failed: ValueError: no"]
    assert "error: process 1: ValueError: no" in capsys.readouterr().err


def test_a_leader_that_dies(pair: Pair, left: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    serving(pair)
    pair.leader._channels[1]._sock.shutdown(2)
    wait_for(lambda: left)
    assert left == [1]
    assert "error: process 0 of the group has gone: it has closed the connection" in capsys.readouterr().err


def test_a_leader_that_ends(pair: Pair, left: list[int]) -> None:
    worker = serving(pair)
    following = InThread(worker.follow, _NoRunner())
    pair.leader.end()
    following.result()
    assert not left and not pair.reasons


def test_a_leader_that_cannot_start_says_why(pair: Pair, left: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    pair.worker()
    with pytest.raises(ConfigError), pair.leader:
        raise ConfigError("the port is taken")
    wait_for(lambda: left)
    assert left == [1] and not pair.reasons
    assert "error: the group ends: process 0: the port is taken; start it again" in capsys.readouterr().err


def test_a_worker_that_built_something_else(pair: Pair) -> None:
    worker = pair.worker()
    pair.leader.start_together()
    worker.wait_for_start()
    InThread(worker.wait_for_service, BUILT | {"KV pool": "8 pages"})
    with pytest.raises(ConfigError, match="process 1 has built something else: KV pool '8 pages', here '7 pages'"):
        pair.leader.wait_until_ready(BUILT)
    pair.leader.end()


def test_a_worker_that_dies_while_it_loads(pair: Pair) -> None:
    waiting = InThread(pair.leader.wait_until_ready, BUILT)
    pair.other_end.close()
    with pytest.raises(EngineDeadError, match="process 1 of the group has gone"):
        waiting.result()


class _NoRunner:
    class buckets:
        shapes: tuple[()] = ()
