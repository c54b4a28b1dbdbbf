"""Messages arrive as they were sent; anything else is refused before it takes memory."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from jaxserve.multihost.wire import Channel, ChannelError, Message, encode
from tests.multihost.pairs import InThread, channels


def sent(data: bytes) -> Channel:
    """The end where these bytes arrive, and then nothing more."""
    one, other = channels()
    one.send_bytes(data)
    one.close()
    return other


def raw(content: Any, arrays: bytes = b"", magic: bytes = b"jxs1") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("!4sIQ", magic, len(text), len(arrays)) + text + arrays


def test_a_message_arrives_as_it_was_sent() -> None:
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(-(2**31), 2**31, (300_000,), np.int32),
        rng.standard_normal((3, 5)).astype(np.float32),
        rng.integers(0, 2, (7,)).astype(np.bool_),
        np.int32(5) * np.ones((), np.int32),
        np.zeros((0, 4), np.int32),
    )
    message = Message("run", {"shape": 3, "mode": None, "text": 'a "b" \u00e9'}, arrays)
    one, other = channels()
    sending = InThread(one.send, message)
    got = other.receive()
    sending.result()
    assert (got.kind, got.fields) == (message.kind, message.fields)
    for mine, theirs in zip(arrays, got.arrays, strict=True):
        assert theirs.dtype == mine.dtype and theirs.shape == mine.shape
        np.testing.assert_array_equal(theirs, mine)


def test_messages_of_many_threads_stay_whole() -> None:
    one, other = channels()
    senders = [InThread(one.send, Message("run", {"n": n}, (np.full(50_000, n, np.int32),))) for n in range(8)]
    seen = set()
    for _ in senders:
        got = other.receive()
        assert (got.arrays[0] == got.fields["n"]).all()
        seen.add(got.fields["n"])
    assert seen == set(range(8))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak"),
        (raw({}, magic=b"jxs2"), "does not speak"),
        (raw(b"{"), "malformed"),
        (raw(b"\xff\xfe"), "malformed"),
        (raw([]), "malformed"),
        (raw({"kind": "run", "fields": {}}), "malformed"),
        (raw({"kind": 1, "fields": {}, "arrays": []}), "malformed"),
        (raw({"kind": "run", "fields": [], "arrays": []}), "malformed"),
        (raw(b"[" * 100_000), "malformed"),
        (raw({"kind": "run", "fields": {}, "arrays": [["object", [1]]]}, bytes(8)), "malformed"),
        (raw({"kind": "run", "fields": {}, "arrays": [["int32", [-1]]]}, bytes(8)), "malformed"),
        (raw({"kind": "run", "fields": {}, "arrays": [["int32", [2**40]]]}, bytes(8)), "malformed"),
        (raw({"kind": "run", "fields": {}, "arrays": [["int32", [1]]]}, bytes(8)), "malformed"),
        (raw({"kind": "run", "fields": {}, "arrays": []})[:-3], "closed"),
        (b"", "closed"),
        (struct.pack("!4sIQ", b"jxs1", 2**31, 0), "too long"),
        (struct.pack("!4sIQ", b"jxs1", 2, 2**62), "too long"),
    ],
)
def test_what_is_no_message(data: bytes, text: str) -> None:
    with pytest.raises(ChannelError, match=text):
        sent(data).receive()


def test_a_stranger_may_say_little() -> None:
    message = encode(Message("hello", {"text": "x" * 100}))
    with pytest.raises(ChannelError, match="too long"):
        sent(message).receive(max_json=64, max_arrays=0)


def test_silence_ends_at_the_timeout() -> None:
    one, other = channels()
    other.set_timeout(0.05)
    with pytest.raises(ChannelError, match=r"silent for 0\.05 seconds"):
        other.receive()
    one.set_timeout(0.05)
    with pytest.raises(ChannelError):  # nor is anything taken that the other side never reads
        one.send(Message("run", {}, (np.zeros(50_000_000, np.int32),)))


def test_what_was_sent_arrives_after_finish() -> None:
    one, other = channels()
    one.send(Message("end", {"reason": "so"}))
    one.finish()
    assert other.receive().fields == {"reason": "so"}
    with pytest.raises(ChannelError, match="closed"):
        other.receive()
