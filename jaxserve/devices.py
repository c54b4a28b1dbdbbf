"""Has jax look for devices while more is imported and read: a GPU takes seconds to be ready."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

import jax

from jaxserve.absent_tpu import quiet_libtpu


def expect_devices() -> None:
    """Looks for them in a thread of its own. Not before a group of processes has been formed, which jax must know by then."""
    quiet_libtpu()
    Thread(target=_look, name="devices").start()


def _look() -> None:
    with suppress(Exception):  # whoever asks for them next is told
        jax.devices()
