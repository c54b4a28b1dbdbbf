"""How a process joins a group: both sides prove that they know the group's secret, then process 0 compares what must agree.

Process 0 sends a nonce; the other answers with a nonce of its own, its identity and an HMAC over both; process 0 answers with
an HMAC over both the other way round. The connection itself is neither encrypted nor signed afterwards: it belongs on a network
of the hosts' own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets

from jaxserve.errors import ConfigError
from jaxserve.multihost.identity import Identity, difference
from jaxserve.multihost.wire import Channel, ChannelError, Message

_MAX_JSON = 2**16  # of somebody who has proved nothing yet


class RefusedError(Exception):
    """Somebody who came is not of the group."""


def admit(channel: Channel, key: bytes, own: Identity, num_processes: int, joined: set[int]) -> int:
    """Process 0's side; returns which process has come.

    Raises:
        RefusedError: it may not join; it has been told why, if it knows the secret.
        ChannelError: it has gone, or speaks otherwise.
    """
    nonce = secrets.token_hex(16)
    channel.send(Message("challenge", {"nonce": nonce}))
    hello = channel.receive(_MAX_JSON, 0)
    process_id, identity, its_nonce = (hello.fields.get(name) for name in ("process_id", "identity", "nonce"))
    if hello.kind != "hello" or type(process_id) is not int or not isinstance(identity, dict) or not isinstance(its_nonce, str):
        raise RefusedError("it does not speak as a process of a group does")
    if not _is_proof(hello.fields.get("proof"), key, "worker", nonce, its_nonce, process_id, identity):
        channel.send(Message("refused", {"reason": "its group key is another; give every process the same --group-key-file"}))
        raise RefusedError("it does not know the group key")
    reason = _objection(process_id, identity, own, num_processes, joined)
    if reason is not None:
        channel.send(Message("refused", {"reason": reason}))
        raise RefusedError(f"process {process_id}: {reason}")
    channel.send(Message("welcome", {"proof": _proof(key, "leader", its_nonce, nonce, process_id, {})}))
    return process_id


def ask_to_join(channel: Channel, key: bytes, own: Identity, process_id: int) -> None:
    """The other side.

    Raises:
        ConfigError: process 0 refuses this process, or does not know the group's secret.
        ChannelError: it has gone.
    """
    challenge = channel.receive(_MAX_JSON, 0)
    its_nonce, nonce = challenge.fields.get("nonce"), secrets.token_hex(16)
    if challenge.kind != "challenge" or not isinstance(its_nonce, str):
        raise ChannelError("it does not speak as process 0 of a group does")
    proof = _proof(key, "worker", its_nonce, nonce, process_id, own)
    channel.send(Message("hello", {"process_id": process_id, "nonce": nonce, "identity": own, "proof": proof}))
    answer = channel.receive(_MAX_JSON, 0)
    if answer.kind == "refused":
        raise ConfigError(f"process 0 refuses process {process_id}: {answer.fields.get('reason')}")
    if answer.kind != "welcome" or not _is_proof(answer.fields.get("proof"), key, "leader", nonce, its_nonce, process_id, {}):
        raise ConfigError("what listens at --coordinator does not know the group key; is it process 0 of this group?")


def _objection(process_id: int, identity: Identity, own: Identity, num_processes: int, joined: set[int]) -> str | None:
    if not 0 < process_id < num_processes:
        return f"its process_id must be between 1 and {num_processes - 1}"
    if process_id in joined:
        return f"there is a process {process_id} already; give each its own --process-id"
    return difference(own, identity)


def _proof(key: bytes, side: str, nonce: str, other_nonce: str, process_id: int, identity: Identity) -> str:
    text = json.dumps([side, nonce, other_nonce, process_id, identity], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _is_proof(given: object, *wanted: object) -> bool:
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, _proof(*wanted))  # type: ignore[arg-type]
