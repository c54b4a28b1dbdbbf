"""The TPU kernels compile for every chip and many shapes, and leave the pool where it is. Nothing runs.

`make test` has them within steps (test_steps_compile.py).
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.pallas_kernels.paged_attention import paged_attention, pages_shape
from jaxserve.tpu.target import open_target
from tests.tpu.steps import CHIPS
from tests.tpu.test_target import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.tpu, pytest.mark.usefixtures("no_compile_cache")]


PAGES, PAGE_SIZE, ROWS = 8192, 64, 32  # a pool that no VMEM could hold


def compile_layer(
    target: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    *,
    value_dim: int | None = None,
    **options: Any,
) -> Any:
    """One layer's attention, which writes to the donated pool."""
    mesh = Mesh(np.array(open_target(target).devices[:1]), ("model",))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    sinks = array((heads,), jnp.bfloat16) if options.pop("sinks", False) else None
    kv = array((tokens, kv_heads, head_dim), jnp.bfloat16)
    v = kv if value_dim is None else None
    pool = array(pages_shape(PAGES, PAGE_SIZE, kv_heads, head_dim, "mosaic_tpu", is_latent=v is None), dtype)
    q, slots, tables = array((tokens, heads, head_dim), jnp.bfloat16), array((tokens,), jnp.int32), array((ROWS, 512), jnp.int32)
    lens = (array((ROWS + 1,), jnp.int32), array((ROWS,), jnp.int32), array((), jnp.int32))
    layer = functools.partial(paged_attention, scale=0.1, value_dim=value_dim, implementation="mosaic_tpu", **options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(layer, donate_argnums=3).lower(q, kv, v, pool, slots, tables, *lens, sinks).compile()


def check(compiled: Any, tokens: int, row_bytes: int) -> None:
    """row_bytes: of a token in the pool."""
    memory, text, pool_bytes = compiled.memory_analysis(), compiled.as_text(), PAGES * PAGE_SIZE * row_bytes
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < pool_bytes // 4, "the pool is copied"
    assert not re.search(rf"\[{PAGES},[^\]]*\]\S* (copy|transpose)\(", text)
    kernels = {"paged_attention_decode"} | ({"paged_attention_chunks"} if tokens > ROWS else set())
    assert {name for name in ("paged_attention_decode", "paged_attention_chunks") if name in text} == kernels


@pytest.mark.parametrize("target", CHIPS)
def test_sinks_and_a_window(target: str) -> None:
    compiled = compile_layer(target, 256, 16, 4, 64, jnp.bfloat16, sinks=True, window=128)
    check(compiled, 256, 4 * 128 * 2)


@pytest.mark.parametrize("target", CHIPS)
def test_decode_of_8_bits(target: str) -> None:
    compiled = compile_layer(target, ROWS, 16, 4, 128, jnp.float8_e4m3fn, softcap=30.0)
    check(compiled, ROWS, 4 * 256)


@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 32, 128), (8, 1, 128), (16, 8, 256), (64, 8, 64), (8, 2, 80)]
)
def test_shapes(heads: int, kv_heads: int, head_dim: int, dtype: Any, target: str) -> None:
    compiled = compile_layer(target, 512, heads, kv_heads, head_dim, dtype)
    lanes = {64: 128, 80: 256, 128: 256, 256: 512}[head_dim]
    check(compiled, 512, kv_heads * lanes * jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize("tokens", [ROWS, 256])
@pytest.mark.parametrize("target", CHIPS)
def test_latents(target: str, tokens: int) -> None:
    """DeepSeek's: 128 heads of queries see one row of 512 + 64 numbers, of which 512 are the value."""
    check(compile_layer(target, tokens, 128, 1, 576, jnp.bfloat16, value_dim=512), tokens, 640 * 2)
