"""The TPU kernels compile for every chip, and leave the pool where it is. Nothing runs."""

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

from jaxserve.pallas_kernels.paged_attention import paged_attention, pages_shape, write_kv, write_rows
from jaxserve.tpu.target import open_target
from tests.tpu.steps import CHIPS
from tests.tpu.test_target import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.usefixtures("no_compile_cache")]


PAGES, PAGE_SIZE, ROWS = 8192, 64, 32  # a pool that no VMEM could hold


def compile_layer(target: str, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any, **options: Any) -> Any:
    """One layer's page write and attention, the pool donated."""
    mesh = Mesh(np.array(open_target(target).devices[:1]), ("model",))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    sinks = array((heads,), jnp.bfloat16) if options.pop("sinks", False) else None

    def layer(pages: Any, q: Any, k: Any, v: Any, slots: Any, *rest: Any) -> Any:
        pages = write_kv(pages, k, v, slots, "mosaic_tpu")
        return pages, paged_attention(q, pages, *rest, scale=0.1, implementation="mosaic_tpu", **options)

    kv = array((tokens, kv_heads, head_dim), jnp.bfloat16)
    pool = array(pages_shape(PAGES, PAGE_SIZE, kv_heads, head_dim, "mosaic_tpu"), dtype)
    q, slots, tables = array((tokens, heads, head_dim), jnp.bfloat16), array((tokens,), jnp.int32), array((ROWS, 512), jnp.int32)
    lens = (array((ROWS + 1,), jnp.int32), array((ROWS,), jnp.int32), array((), jnp.int32))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(layer, donate_argnums=0).lower(pool, q, kv, kv, slots, tables, *lens, sinks)
    return lowered.compile()


def check(compiled: Any, pool_bytes: int, kernels: set[str]) -> None:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < pool_bytes // 4, "the pool is copied"
    assert not re.search(rf"\[{PAGES},[^\]]*\]\S* (copy|transpose)\(", text)
    assert {name for name in ("write_pages", "paged_attention_decode", "paged_attention_chunks") if name in text} == kernels


@pytest.mark.parametrize("target", CHIPS)
def test_every_kernel(target: str) -> None:
    compiled = compile_layer(target, 256, 16, 4, 64, jnp.bfloat16, sinks=True, window=128)
    check(compiled, PAGES * PAGE_SIZE * 4 * 128 * 2, {"write_pages", "paged_attention_decode", "paged_attention_chunks"})


@pytest.mark.tpu
@pytest.mark.parametrize("target", CHIPS)
def test_decode_of_8_bits(target: str) -> None:
    compiled = compile_layer(target, ROWS, 16, 4, 128, jnp.float8_e4m3fn, softcap=30.0)
    check(compiled, PAGES * PAGE_SIZE * 4 * 256, {"write_pages", "paged_attention_decode"})


@pytest.mark.tpu
@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 32, 128), (8, 1, 128), (16, 8, 256), (64, 8, 64), (8, 2, 80)]
)
def test_shapes(heads: int, kv_heads: int, head_dim: int, dtype: Any, target: str) -> None:
    compiled = compile_layer(target, 512, heads, kv_heads, head_dim, dtype)
    lanes = {64: 128, 80: 256, 128: 256, 256: 512}[head_dim]
    pool = PAGES * PAGE_SIZE * kv_heads * lanes * jnp.dtype(dtype).itemsize
    check(compiled, pool, {"write_pages", "paged_attention_decode", "paged_attention_chunks"})


@pytest.mark.tpu
@pytest.mark.parametrize("tokens", [ROWS, 256])
@pytest.mark.parametrize("target", CHIPS)
def test_latents(target: str, tokens: int) -> None:
    """DeepSeek's: 128 heads of queries see one row of 512 + 64 numbers, of which 512 are the value."""
    mesh = Mesh(np.array(open_target(target).devices[:1]), ("model",))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))

    def layer(pages: Any, q: Any, latents: Any, slots: Any, *rest: Any) -> Any:
        pages = write_rows(pages, latents, slots, "mosaic_tpu")
        return pages, paged_attention(q, pages, *rest, scale=0.1, value_dim=512, implementation="mosaic_tpu")

    pool = array(pages_shape(PAGES, PAGE_SIZE, 1, 576, "mosaic_tpu", is_latent=True), jnp.bfloat16)
    q, latents = array((tokens, 128, 576), jnp.bfloat16), array((tokens, 1, 576), jnp.bfloat16)
    slots, tables = array((tokens,), jnp.int32), array((ROWS, 512), jnp.int32)
    lens = (array((ROWS + 1,), jnp.int32), array((ROWS,), jnp.int32), array((), jnp.int32))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(layer, donate_argnums=0).lower(pool, q, latents, slots, tables, *lens).compile()
    kernels = {"write_pages", "paged_attention_decode"} | ({"paged_attention_chunks"} if tokens > ROWS else set())
    check(compiled, PAGES * PAGE_SIZE * 640 * 2, kernels)
