"""Traced programs kept in a folder: found again by what they depend on, and by nothing less."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.interface import Runtime
from jaxserve.programs import Program, declare_programs
from jaxserve.trace_cache import TraceCache
from tests.tiny import tiny_engine

REPLICATED = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def program(size: int, calls: list[int]) -> Program:
    def double(x: jax.Array) -> jax.Array:
        calls.append(size)
        return x * 2

    argument = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=REPLICATED)
    return Program("double", "double", double, (argument,), donated=(0,), out_shardings=REPLICATED)


def test_a_second_start_traces_nothing_and_gives_the_same(tmp_path: Path) -> None:
    calls: list[int] = []
    for wanted in ([3], [3]):  # the second time, the folder has it
        compiled = TraceCache(tmp_path, "model").lower(program(3, calls), "cpu").compile()
        np.testing.assert_array_equal(compiled(jnp.arange(3.0)), [0, 2, 4])
        assert calls == wanted
    TraceCache(tmp_path, "another model").lower(program(3, calls), "cpu")
    TraceCache(tmp_path, "model").lower(program(4, calls), "cpu")
    assert calls == [3, 3, 4]


def test_what_nobody_has_asked_for_in_a_month_goes(tmp_path: Path) -> None:
    calls: list[int] = []
    cache = TraceCache(tmp_path, "model")
    for size in (3, 4):
        cache.lower(program(size, calls), "cpu")
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    cache.lower(program(3, calls), "cpu")  # asked for again
    TraceCache(tmp_path, "model")
    assert len(list(tmp_path.iterdir())) == 1
    cache.lower(program(3, calls), "cpu")
    assert calls == [3, 4]


def test_other_settings_of_jax_are_another_entry(tmp_path: Path) -> None:
    calls: list[int] = []
    TraceCache(tmp_path, "model").lower(program(3, calls), "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        TraceCache(tmp_path, "model").lower(program(3, calls), "cpu")
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert calls == [3, 3]


def test_a_damaged_file_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    TraceCache(tmp_path, "model").lower(program(3, calls), "cpu")
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"no program")
    compiled = TraceCache(tmp_path, "model").lower(program(3, calls), "cpu").compile()
    np.testing.assert_array_equal(compiled(jnp.arange(3.0)), [0, 2, 4])
    assert calls == [3, 3] and "damaged" in caplog.text
    assert path.read_bytes() != b"no program"


def test_each_program_of_another_pool_is_another_entry(tmp_path: Path) -> None:
    """Reset has no arguments: its results must tell pools apart."""
    inputs = tiny_engine().runner._inputs
    cache = TraceCache(tmp_path, "model")
    caches = tuple(
        jax.ShapeDtypeStruct((c.shape[0] + 1, *c.shape[1:]), c.dtype, sharding=c.sharding) for c in inputs.state.caches
    )
    larger = replace(inputs, state=replace(inputs.state, caches=caches))
    with_pool = {"reset", "copy_pages"}
    for a, b in zip(*(declare_programs(i, lambda *args: args, Runtime("cpu")) for i in (inputs, larger)), strict=True):
        differs = a.name in with_pool or a.name.startswith(("decode", "forward"))
        assert (cache._path(a, "cpu") != cache._path(b, "cpu")) == differs, a.name
