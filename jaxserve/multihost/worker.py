"""Worker: a process of a group other than process 0. Does on its devices what process 0 says; knows no requests."""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from jaxserve.errors import ConfigError
from jaxserve.multihost.config import GroupConfig
from jaxserve.multihost.exits import leave
from jaxserve.multihost.handshake import ask_to_join
from jaxserve.multihost.identity import Identity
from jaxserve.multihost.leader import BEAT_S, HANDSHAKE_S, JOIN_S, SILENT_S, STARTING_S
from jaxserve.multihost.wire import Channel, ChannelError, Message, encode
from jaxserve.runner import Runner
from jaxserve.sampler import Mode
from jaxserve.shaping import Shaping

RETRY_S = 0.5


class Worker:
    """The connection to process 0. When it breaks, the process ends: its devices wait for others that may never come."""

    def __init__(self, channel: Channel, process_id: int) -> None:
        self._channel = channel
        self._process_id = process_id
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        channel.set_timeout(JOIN_S)  # until all are there nothing comes
        threading.Thread(target=self._listen, name="group-listen", daemon=True).start()

    def wait_for_start(self) -> None:
        """Waits until every process has joined."""
        self._expect("start")
        self._channel.set_timeout(STARTING_S)
        threading.Thread(target=self._beat, name="group-beat", daemon=True).start()

    def wait_for_service(self, description: dict[str, str]) -> None:
        """Says what has been built, and waits until every process has."""
        self._channel.send(Message("ready", dict(description)))
        self._expect("serve")
        self._channel.set_timeout(SILENT_S)

    def fail(self, reason: str) -> NoReturn:
        """Tells process 0 why the group must end, and ends."""
        print(f"error: process {self._process_id}: {reason}", file=sys.stderr)
        with contextlib.suppress(ChannelError):  # it knows already
            self._channel.send(Message("failed", {"reason": reason}))
        leave(1)

    def follow(self, runner: Runner) -> None:
        """Does what process 0 does, until it says that it has ended."""
        before: list[dict[str, jax.Array]] = []
        shapes = runner.buckets.shapes
        while (message := self._messages.get()).kind != "end":
            outputs = _repeat(message, runner, shapes)
            if outputs is not None:
                jax.block_until_ready(before)  # raises what its step has raised; and no more than two are under way
                before = outputs

    def _expect(self, kind: str) -> None:
        message = self._messages.get()
        if message.kind == "end":
            leave(0)
        if message.kind != kind:
            self.fail(f"process 0 says {message.kind!r}, not {kind!r}")

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except ChannelError as e:
                print(f"error: process 0 of the group has gone: {e}; start the group again", file=sys.stderr)
                leave(1)
            if message.kind == "end" and "reason" in message.fields:
                print(f"error: the group ends: {message.fields['reason']}; start it again", file=sys.stderr)
                leave(1)
            if message.kind != "beat":
                self._messages.put(message)
            if message.kind == "end":
                return

    def _beat(self) -> None:
        beat = encode(Message("beat"))
        try:
            while True:
                self._channel.send_bytes(beat)
                time.sleep(BEAT_S)
        except ChannelError:
            return  # _listen has seen the same


def _repeat(message: Message, runner: Runner, shapes: list[Any]) -> list[dict[str, jax.Array]] | None:
    """What LeadingRunner's methods send; the outputs of a step."""
    fields, arrays = message.fields, message.arrays
    if message.kind == "run":
        mode = fields["mode"]
        return runner.run(shapes[fields["shape"]], arrays[0], None if mode is None else Mode(mode), fields["sampled"])
    if message.kind == "copy":
        runner.copy(fields["program"], *arrays)
    elif message.kind == "shaping":
        runner.write_shaping(Shaping(*arrays), fields["slot"])  # type: ignore[arg-type]
    else:
        raise ChannelError(f"process 0 says {message.kind!r}, which is unknown")
    return None


def join(config: GroupConfig, own: Identity, timeout_s: float = JOIN_S) -> Worker:
    """Finds process 0 and is let in.

    Raises:
        ConfigError: it is not found in time, or refuses this process.
    """
    channel = _connect(config.address, timeout_s)
    channel.set_timeout(timeout_s)  # process 0 lets one in after the other
    try:
        ask_to_join(channel, config.read_key(), own, config.process_id)
    except ChannelError as e:
        raise ConfigError(f"process 0 at {config.coordinator} does not let this process in: {e}") from e
    return Worker(channel, config.process_id)


def _connect(address: tuple[str, int], timeout_s: float) -> Channel:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return Channel(socket.create_connection(address, timeout=HANDSHAKE_S))
        except OSError as e:  # the host's name is not known yet, or process 0 does not listen yet
            if time.monotonic() > deadline:
                raise ConfigError(f"no process 0 at {address[0]}:{address[1]} within {timeout_s:g} seconds: {e}") from e
            time.sleep(RETRY_S)
