"""Leader: the other processes of a group, as process 0 sees them. Lets them in, sends to all, and notices when one has gone."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

from jaxserve.errors import ConfigError, EngineDeadError
from jaxserve.multihost.config import GroupConfig
from jaxserve.multihost.exits import leave
from jaxserve.multihost.handshake import RefusedError, admit
from jaxserve.multihost.identity import Identity
from jaxserve.multihost.wire import Channel, ChannelError, Message, encode

log = logging.getLogger(__name__)

JOIN_S = 1800.0  # until all are there: a host may first have to fetch the model
HANDSHAKE_S = 5.0  # for somebody who has come: the next one waits meanwhile
BEAT_S = 1.0
SILENT_S = 7.0  # a host that lost power closes no connection; with the beat this leaves 10 s until the group has ended
GOODBYE_S = 5.0
STARTING_S = 60.0  # the same while it loads and compiles, which can keep a process from anything else for seconds


class Leader:
    """Connections to the processes of a group. Any thread may call `fail`; the engine's thread sends.

    Attributes:
        cause: why the group has ended; None while it has not.
    """

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self.cause: str | None = None
        self._channels = dict(channels)
        self._on_failure: Callable[[str], None] = _leave
        self._ending = threading.Lock()
        self._ended = threading.Event()
        self._ready: dict[int, dict[str, str]] = {}
        self._changed = threading.Condition()  # guards _ready and cause
        self._watchers = [
            threading.Thread(target=self._watch, args=item, name=f"group-{item[0]}", daemon=True) for item in channels.items()
        ]
        for channel in self._channels.values():
            channel.set_timeout(STARTING_S)
        for thread in (*self._watchers, threading.Thread(target=self._beat, name="group-beat", daemon=True)):
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """The others end with this process, and for the same reason."""
        if error is None:
            self.end()
        elif self._begin_end(str(error)):
            self._say_goodbye({"reason": f"process 0: {error}"})

    def start_together(self) -> None:
        """Tells all that all are there."""
        self.broadcast(Message("start"))

    def wait_until_ready(self, description: Mapping[str, str]) -> None:
        """Waits until all have loaded and compiled.

        Args:
            description: what process 0 has built; the others must have built the same.

        Raises:
            EngineDeadError: one of them has gone.
            ConfigError: one has built something else.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.cause is not None or len(self._ready) == len(self._channels))
        if self.cause is not None:
            raise EngineDeadError(self.cause)
        for process_id, theirs in self._ready.items():
            for name, mine in description.items():
                if theirs.get(name) != mine:
                    raise ConfigError(
                        f"process {process_id} has built something else: {name} {theirs.get(name)!r}, here {mine!r}. The hosts must "
                        "be alike; if only their memory differs, give --num-gpu-blocks-override."
                    )
        for channel in self._channels.values():
            channel.set_timeout(SILENT_S)
        self.broadcast(Message("serve"))

    def on_failure(self, call: Callable[[str], None]) -> None:
        """What to do with the reason when the group ends by itself; before this is called, the process ends."""
        self._on_failure = call

    def broadcast(self, message: Message) -> None:
        """Sends a message to every process.

        Raises:
            EngineDeadError: the group has ended.
        """
        data = encode(message)
        for process_id, channel in self._channels.items():
            try:
                channel.send_bytes(data)
            except ChannelError as e:
                self.fail(f"process {process_id} of the group has gone: {e}")
        if self.cause is not None:
            raise EngineDeadError(f"{self.cause}; start the group again")

    def end(self) -> None:
        """Lets the others go, as no more steps will come, and waits until they have gone: they use what jax has in this process."""
        if self._begin_end("the group has been ended"):
            self._say_goodbye({})
            deadline = time.monotonic() + GOODBYE_S
            for watcher in self._watchers:
                watcher.join(max(0.0, deadline - time.monotonic()))

    def fail(self, reason: str) -> None:
        """Ends the group; the first reason stands."""
        if self._begin_end(reason):
            log.error("the group ends: %s", reason)
            self._say_goodbye({"reason": reason})
            self._on_failure(reason)

    def wait_for_cause(self, seconds: float) -> str | None:
        """Why the group has ended, for somebody who has met the consequence first."""
        with self._changed:
            self._changed.wait_for(lambda: self.cause is not None, seconds)
        return self.cause

    def _begin_end(self, reason: str) -> bool:
        with self._ending:
            if self._ended.is_set():
                return False
            self._ended.set()
        with self._changed:
            self.cause = reason
            self._changed.notify_all()
        return True

    def _say_goodbye(self, fields: dict[str, str]) -> None:
        for channel in self._channels.values():
            channel.set_timeout(0.2)
            with contextlib.suppress(ChannelError):  # it has gone itself
                channel.send(Message("end", fields))
                channel.finish()

    def _watch(self, process_id: int, channel: Channel) -> None:
        """Takes in what one process says, until it says nothing more."""
        while True:
            try:
                message = channel.receive()
            except ChannelError as e:
                self.fail(f"process {process_id} of the group has gone: {e}")
                return
            if message.kind == "failed":
                self.fail(f"process {process_id} of the group has failed: {message.fields.get('reason')}")
            elif message.kind == "ready":
                with self._changed:
                    self._ready[process_id] = message.fields
                    self._changed.notify_all()

    def _beat(self) -> None:
        beat = encode(Message("beat"))
        while not self._ended.wait(BEAT_S):
            for process_id, channel in self._channels.items():
                try:
                    channel.send_bytes(beat)
                except ChannelError as e:
                    self.fail(f"process {process_id} of the group has gone: {e}")


def gather(config: GroupConfig, own: Identity, timeout_s: float = JOIN_S) -> Leader:
    """Waits until every process of the group has come.

    Raises:
        ConfigError: the address is not this machine's, or somebody has not come in time.
    """
    key, deadline = config.read_key(), time.monotonic() + timeout_s
    channels: dict[int, Channel] = {}
    with _listen(config.address, deadline) as listener:
        log.info("waiting for %d more processes at %s", config.num_processes - 1, config.coordinator)
        while len(channels) < config.num_processes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, address = listener.accept()
            except TimeoutError as e:
                missing = sorted(set(range(1, config.num_processes)) - set(channels))
                raise ConfigError(f"processes {missing} of the group have not come within {timeout_s:g} seconds") from e
            channel = Channel(sock)
            channel.set_timeout(HANDSHAKE_S)
            try:
                process_id = admit(channel, key, own, config.num_processes, set(channels))
            except (RefusedError, ChannelError) as e:
                log.warning("refused %s: %s", address[0], e)
                channel.close()
                continue
            channels[process_id] = channel
            log.info("process %d has come from %s; %d of %d", process_id, address[0], len(channels) + 1, config.num_processes)
    return Leader(channels)


def _listen(address: tuple[str, int], deadline: float) -> socket.socket:
    """Takes the port; a name that is new may need some time until it is known."""
    while True:
        try:
            family, _, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror as e:
            if time.monotonic() > deadline:
                raise ConfigError(f"the host of --coordinator, {address[0]!r}, is not known: {e.strerror}") from e
            time.sleep(1)
    try:
        return socket.create_server(target[:2], family=family)
    except OSError as e:
        raise ConfigError(
            f"cannot listen on {address[0]}:{address[1]}: {e.strerror}. --coordinator must be an address of process 0's machine, "
            "with this port and the next one free."
        ) from e


def _leave(reason: str) -> None:
    """While there is no engine yet that could tell its users."""
    time.sleep(0.5)  # the others end by what they were told, before jax finds this process gone
    print(f"error: {reason}; start the group again", file=sys.stderr)
    leave(1)
