"""What a start-up says when the device has no memory left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxserve.errors import ConfigError


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turns the runtime's out-of-memory error into one that says what to do.

    Raises:
        ConfigError: the device has run out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        first = str(e).partition("\n")[0]
        raise ConfigError(
            f"the device ran out of memory at start-up ({first}). Stop what else uses it, lower --gpu-memory-utilization, "
            "--max-num-batched-tokens or --max-num-seqs, or raise --tensor-parallel-size."
        ) from e
