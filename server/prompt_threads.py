"""PromptThreads: where templates are rendered and texts encoded, off the event loop and for a limited time. Knows neither."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jaxserve.errors import InvalidRequestError

LONG = 100_000  # characters: such a prompt takes a tenth of a second, and waits only for others like it


class PromptThreads:
    """Two threads, for prompts and for long prompts, so that those who send long ones hold up each other alone."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(1, "prompts"), ThreadPoolExecutor(1, "long-prompts")

    async def run[T](self, size: int, work: Callable[[], T]) -> T:
        """Does `work` on a thread.

        Args:
            size: characters that it goes through.

        Raises:
            InvalidRequestError: it took longer than the limit. Python code, such as a template's loop, is stopped in the middle;
                the tokenizer's is not, but its time grows with the text's size alone, which is limited.
        """
        thread = self._threads[size > LONG]
        return await asyncio.get_running_loop().run_in_executor(thread, limited, self._timeout_s, work)

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)


class _TimeIsUpError(BaseException):
    """Not an Exception: whoever calls a template takes those for the template's."""


def limited[T](timeout_s: float, work: Callable[[], T]) -> T:
    """Does `work`, and stops it when its time is up. See PromptThreads.run."""
    lock = threading.Lock()
    is_running = True
    own_id = ctypes.c_ulong(threading.get_ident())

    def stop() -> None:
        with lock:
            if is_running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(own_id, ctypes.py_object(_TimeIsUpError))

    timer = threading.Timer(timeout_s, stop)
    try:
        try:
            timer.start()
            return work()
        finally:
            timer.cancel()
            with lock:
                is_running = False
                ctypes.pythonapi.PyThreadState_SetAsyncExc(own_id, None)  # one that has not arrived yet
    except _TimeIsUpError:
        text = f"the prompt was not made within {timeout_s:g} seconds: shorten it"
        raise InvalidRequestError(text) from None
