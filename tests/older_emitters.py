"""Makes XLA compile small CPU programs in a fraction of the time; they take about twice as long to run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from jax._src import compiler

_OPTION = "xla_cpu_disable_new_fusion_emitters"

# For other processes, with no optimizations either.
QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"--xla_backend_extra_options={_OPTION} --xla_cpu_parallel_codegen_split_count=1"
)


def _nested(field: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes or another message; all of these are shorter than 128 bytes."""
    key = field << 3 | 2
    head = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
    return head + bytes([len(content)]) + content


# XLA's newer emitters set up all of MLIR again for each fusion of a program: four fifths of the time it takes to compile a layer.
# The option that turns them off is in a table for which jax's compile options have no name, so it is written as they are stored:
# executable_build_options (3), its debug_options (3), its xla_backend_extra_options (500), and there a name with an empty value.
_OLDER_EMITTERS = _nested(3, _nested(3, _nested(500, _nested(1, _OPTION.encode()) + _nested(2, b""))))


@contextmanager
def older_emitters() -> Iterator[None]:
    """While it lasts, on CPUs. Each program is also compiled in one part: two workers keep two cores busy, and parts cost time."""
    get_options = compiler.get_compile_options

    @functools.wraps(get_options)
    def with_older_emitters(*args: Any, **kwargs: Any) -> Any:
        options = get_options(*args, **kwargs)
        backend = kwargs.get("backend")
        if backend is None or backend.platform != "cpu":
            return options
        changed = type(options).ParseFromString(options.SerializeAsString() + _OLDER_EMITTERS)
        changed.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_parallel_codegen_split_count", 1)]
        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", with_older_emitters)
        yield
