"""Compiles the GPU attention kernels for an H100 on a machine without one, and prints what ptxas says of registers and spills.

Needs `pip install 'jax[cuda13]'` and no GPU: PYTHONPATH=. python bench/kernels/compile.py [variant ...]
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the CUDA plugin registers, and is never initialised
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu, mosaic_gpu_latent
from jaxserve.tpu.target import open_target

E4M3 = jnp.float8_e4m3fn
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "page64": {"page": 64},
    "page128": {"page": 128},
    "window": {"window": 1000},
    "softcap": {"softcap": 50.0},
    "sinks": {"sinks": True},
    "gpt-oss": {"n": 64, "h": 64, "sinks": True, "window": 128},
    "group7": {"n": 14, "k": 2, "h": 64},
    "mha": {"n": 8},
    "mqa": {"k": 1},
    "h256": {"n": 16, "h": 256},
    "gemma": {"n": 16, "h": 256, "window": 1000, "softcap": 50.0},
    "shared": {"shares_pages": True},
    "shared group2 sinks": {"n": 16, "shares_pages": True, "sinks": True},
    "shared h64": {"n": 16, "h": 64, "shares_pages": True, "softcap": 50.0},
    "shared e4m3": {"dtype": E4M3, "shares_pages": True},
    "e4m3": {"dtype": E4M3},
    "e4m3 h64": {"n": 16, "h": 64, "dtype": E4M3},
    "e4m3 h256": {"n": 16, "h": 256, "dtype": E4M3},
    "latent": {"n": 16, "h": 576, "value_dim": 512},
    "latent 20 heads": {"n": 20, "h": 576, "value_dim": 512},
    "latent 128 heads": {"n": 128, "h": 576, "value_dim": 512},
}


def build(sharding: Any, *, decode_only: bool, b: int = 64, n: int = 32, k: int = 8, h: int = 128, page: int = 16,
          dtype: Any = jnp.bfloat16, sinks: bool = False, **options: Any) -> None:  # fmt: skip
    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    is_latent = "value_dim" in options
    args = [array((b if decode_only else 512, n, h), jnp.bfloat16), array((4096, page, 1 if is_latent else 2 * k, h), dtype)]
    args += [array((b, 4096 // page)), array((b + 1,)), array((b,)), array(())]
    args += [array((n,), jnp.float32)] if sinks else []
    attend = mosaic_gpu_latent.paged_attention if is_latent else mosaic_gpu.paged_attention
    f = functools.partial(attend, scale=h**-0.5, decode_only=decode_only, **options)
    jax.jit(f).lower(*args).compile()


def main() -> None:
    sharding = NamedSharding(Mesh(np.array(open_target("gpu:h100:1").devices), ("x",)), PartitionSpec())
    for name in sys.argv[1:] or VARIANTS:
        for decode_only in (True, False):
            begin = time.time()
            print(f"== {name}, {'decode' if decode_only else 'mixed'}", flush=True)
            build(sharding, decode_only=decode_only, **VARIANTS[name])
            print(f"   {time.time() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
