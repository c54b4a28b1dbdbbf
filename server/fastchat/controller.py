"""Registration: tells a FastChat controller that this worker is there, again and again."""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

HEART_BEAT_S = 45  # FastChat's own; a controller forgets a worker after 90 seconds
TIMEOUT_S = 5


class Registration:
    """A thread that registers the worker, and does so again when the controller has forgotten it."""

    def __init__(self, controller: str, worker: str, status: Callable[[], dict[str, Any]], beat_s: float = HEART_BEAT_S) -> None:
        self._controller = controller.rstrip("/")
        self._worker = worker
        self._status = status
        self._beat_s = beat_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastchat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        is_known = False
        while True:
            try:
                if not is_known:
                    worker = {"worker_name": self._worker, "check_heart_beat": True, "multimodal": False}
                    self._post("/register_worker", worker | {"worker_status": self._status()})
                beat = {"worker_name": self._worker, "queue_length": self._status()["queue_length"]}
                is_known = bool(self._post("/receive_heart_beat", beat)["exist"])
                if self._stopping.wait(self._beat_s if is_known else 1):
                    return
            except (OSError, ValueError, KeyError, TypeError) as e:
                log.warning("the FastChat controller %s does not answer: %s", self._controller, e)
                is_known = False
                if self._stopping.wait(min(self._beat_s, 5)):
                    return

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._controller + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read() or b"null")
