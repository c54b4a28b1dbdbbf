"""Channel: messages between two processes of a group. A fixed header, a JSON object, the raw bytes of arrays; never pickle."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("!4sIQ")  # magic, bytes of JSON, bytes of all arrays
_MAGIC = b"jxs1"
_DTYPES = ("int32", "float32", "bool")  # of what the host sends to its devices
MAX_JSON = 2**20
MAX_ARRAYS = 2**30


class ChannelError(Exception):
    """The other side has gone, or what it sends is no message."""


@dataclass(frozen=True)
class Message:
    """What one process tells another.

    Attributes:
        fields: JSON values.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[NDArray[Any], ...] = ()


def encode(message: Message) -> bytes:
    """The message as it is sent."""
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    described = [[array.dtype.name, list(array.shape)] for array in message.arrays]
    text = json.dumps({"kind": message.kind, "fields": message.fields, "arrays": described}).encode()
    header = _HEADER.pack(_MAGIC, len(text), sum(array.nbytes for array in arrays))
    return b"".join((header, text, *(array.tobytes() for array in arrays)))


class Channel:
    """One side of a connection. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a plan must not wait for the next one
        self._sock = sock
        self._sending = threading.Lock()

    def set_timeout(self, seconds: float) -> None:
        """How long the other side may be silent, or leave unread what is sent, before it counts as gone."""
        self._sock.settimeout(seconds)

    def send(self, message: Message) -> None:
        """Raises ChannelError when the other side has gone."""
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """Sends what `encode` gave, as one piece even where several threads send."""
        try:
            with self._sending:
                self._sock.sendall(data)
        except OSError as e:
            raise ChannelError(str(e)) from e

    def receive(self, max_json: int = MAX_JSON, max_arrays: int = MAX_ARRAYS) -> Message:
        """Waits for the next message.

        Raises:
            ChannelError: the other side has gone, says nothing for too long, or sends something else.
        """
        magic, json_size, arrays_size = _HEADER.unpack(self._read(_HEADER.size))
        if magic != _MAGIC:
            raise ChannelError("it does not speak jaxserve's protocol")
        if json_size > max_json or arrays_size > max_arrays:
            raise ChannelError(f"its message of {json_size:,} + {arrays_size:,} bytes is too long")
        return _decode(self._read(json_size), self._read(arrays_size))

    def finish(self) -> None:
        """Nothing more will be sent. What was sent still arrives, which `close` does not promise."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection, both ways."""
        self._sock.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            try:
                count = self._sock.recv_into(view[done:])
            except TimeoutError as e:
                raise ChannelError(f"it has been silent for {self._sock.gettimeout():g} seconds") from e
            except OSError as e:
                raise ChannelError(str(e)) from e
            if count == 0:
                raise ChannelError("it has closed the connection")
            done += count
        return data


def _decode(text: bytearray, data: bytearray) -> Message:
    try:
        content = json.loads(text)
        kind, fields, described = content["kind"], content["fields"], content["arrays"]
        if not isinstance(kind, str) or not isinstance(fields, dict):
            raise TypeError("kind must be text, fields an object")
        return Message(kind, fields, tuple(_arrays(described, data)))
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ChannelError(f"its message is malformed ({type(e).__name__}: {e})") from e


def _arrays(described: Sequence[Any], data: bytearray) -> list[NDArray[Any]]:
    arrays, at = [], 0
    for name, shape in described:
        if name not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"array of {name!r} {shape!r}")
        count = math.prod(shape)
        arrays.append(np.frombuffer(data, name, count, at).reshape(shape))
        at += count * np.dtype(name).itemsize
    if at != len(data):
        raise ValueError(f"{len(data)} bytes for arrays of {at}")
    return arrays
