"""Checks and times the GPU attention kernels on one device: PYTHONPATH=. python bench/kernels/attention.py [--only ...].

Self-contained: random pools, no model. Each timing is a program of several layers, each layer's output the next one's queries,
so that nothing overlaps and launches cost what they cost in a model. Prints tables; writes all figures as JSON to --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels.attention_checks import BF16, E4M3, check_cases
from jaxserve.pallas_kernels.paged_attention import mosaic_gpu_latent
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_decode import decode
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import plan_decode, plan_prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_prefill import PrefillConfig, prefill
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_shapes import ROWS


def wall(f: Callable[..., Any], args: tuple[Any, ...], calls: int, reps: int = 5) -> float:
    """Median seconds of a call, of `reps` runs of `calls` calls."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        for _ in range(calls):
            result = f(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def device_us(f: Callable[..., Any], args: tuple[Any, ...], kernel: str, calls: int = 3) -> tuple[float, float]:
    """Median duration of the kernels whose name contains `kernel`, and the sum of all others a call, from the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = f(*args)
            jax.block_until_ready(result)
        path = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        found, rest = [], 0.0
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "/device:GPU" not in plane.name:
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    if kernel in event.name:
                        found.append(event.duration_ns / 1e3)
                    else:
                        rest += event.duration_ns / 1e3
    return statistics.median(found or [float("nan")]), rest / calls


def copy_bandwidth() -> float:
    x = jax.random.normal(jax.random.key(0), (1 << 30,), BF16)
    return 2 * x.nbytes / wall(jax.jit(lambda x: x + 1), (x,), 10)


@functools.cache
def random_pool(pages: int, page: int, k: int, h: int, dtype: str) -> jax.Array:
    return jax.jit(lambda key: jax.random.normal(key, (pages, page, 2 * k, h), BF16).astype(dtype))(jax.random.key(1))


def layer_tables(layers: int, rows: int, width: int, pages: int) -> list[jax.Array]:
    """Page tables of several layers over one pool: disjoint as far as it reaches, so that the L2 cache holds little."""
    rng = np.random.default_rng(3)
    ids = np.concatenate([rng.permutation(pages) for _ in range(-(-layers * rows * width // pages))])
    return [jnp.asarray(ids[i * rows * width : (i + 1) * rows * width].reshape(rows, width), jnp.int32) for i in range(layers)]


def time_decode(name: str, lens: list[int], *, n: int = 32, k: int = 8, h: int = 128, page: int = 16, dtype: Any = BF16,
                layers: int | None = None, split: int | None = None, window: int | None = None, max_len: int | None = None,
                config: Any = None, copy: float = 1.0, prefix: int = 0, shares_pages: bool = False) -> dict[str, Any]:  # fmt: skip
    """prefix: tokens that all rows have in common, in the same pages; bandwidths count them for every row."""
    rows = len(lens)
    width = -(-(max_len or max(lens)) // page)
    seen = [min(x, window) if window else x for x in lens]
    num_bytes = sum(seen) * 2 * k * h * jnp.dtype(dtype).itemsize
    pages = max(2**31 // (page * 2 * k * h * jnp.dtype(dtype).itemsize), rows * width)
    layers = layers or max(3, min(8, int(2e9 // num_bytes)))
    pool = random_pool(pages, page, k, h, jnp.dtype(dtype).name)
    tables = [table.at[:, : prefix // page].set(table[0, : prefix // page]) for table in layer_tables(layers, rows, width, pages)]

    def steps(q: jax.Array, pool: jax.Array, tables: list[jax.Array], lens: jax.Array) -> jax.Array:
        plan = plan_decode(lens, jnp.int32(rows), num_kv_heads=k, max_len=width * page, window=window, split=split,
                           page_tables=tables[0], seats=ROWS * k // n if shares_pages else 1)  # fmt: skip
        layer = jax.jit(functools.partial(decode, scale=h**-0.5, config=config))  # lowered once
        for table in tables:  # shared alike, so one plan serves them all
            q = layer(q, pool, table, plan)
        return q

    q = jax.random.normal(jax.random.key(0), (rows, n, h)).astype(BF16)
    lens_array = jnp.asarray(lens, jnp.int32)
    f, args = jax.jit(steps), (q, pool, tables, lens_array)
    seconds = wall(f, args, 5) / layers
    device, plan = device_us(f, args, "paged_decode")
    return {
        "case": name, "us": seconds * 1e6, "device_us": device, "gbps": num_bytes / device / 1e3,
        "of_copy": num_bytes / device * 1e6 / copy, "kv_mb": num_bytes / 1e6, "layers": layers, "split": split, "plan_us": plan,
    }  # fmt: skip


def time_prefill(name: str, chunks: list[tuple[int, int]], *, n: int = 32, k: int = 8, h: int = 128, page: int = 16,
                 dtype: Any = BF16, layers: int = 4, window: int | None = None, softcap: float | None = None,
                 config: Any = None) -> dict[str, Any]:  # fmt: skip
    queries, lens = [c[0] for c in chunks], [c[0] + c[1] for c in chunks]
    rows, tokens = len(chunks), sum(queries)
    width = -(-max(lens) // page)
    pages = max(2**30 // (page * 4 * k * h), rows * width)
    pool = random_pool(pages, page, k, h, jnp.dtype(dtype).name)
    tables = layer_tables(layers, rows, width, pages)
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(queries)]), jnp.int32)

    def steps(q: jax.Array, pool: jax.Array, tables: list[jax.Array], starts: jax.Array, lens: jax.Array) -> jax.Array:
        plan = plan_prefill(starts, lens, jnp.int32(0), num_tokens=tokens, num_heads=n, num_kv_heads=k, window=window)
        layer = jax.jit(functools.partial(prefill, scale=h**-0.5, softcap=softcap, config=config))  # lowered once
        for table in tables:
            q = layer(q, pool, table, plan)
        return q

    pairs = 0
    for new, prefix in chunks:
        position = prefix + np.arange(new) + 1
        pairs += int(np.minimum(position, window).sum() if window else position.sum())
    flops = 4 * n * h * pairs
    q = jax.random.normal(jax.random.key(0), (tokens, n, h)).astype(BF16)
    f, args = jax.jit(steps), (q, pool, tables, starts, jnp.asarray(lens, jnp.int32))
    seconds = wall(f, args, 5) / layers
    device, plan = device_us(f, args, "paged_prefill")
    return {"case": name, "us": seconds * 1e6, "device_us": device, "tflops": flops / device / 1e6, "plan_us": plan}


def time_latent(name: str, chunks: list[tuple[int, int]], *, n: int = 16, layers: int = 4, copy: float = 1.0) -> dict[str, Any]:
    """DeepSeek's latents: rows of 576, of which 512 are the value. chunks: new tokens and those before of each row."""
    rows, tokens, lens = len(chunks), sum(c[0] for c in chunks), [c[0] + c[1] for c in chunks]
    width = -(-max(lens) // 16)
    pages = max(2**31 // (16 * 1152), rows * width)
    pool = jax.jit(lambda key: jax.random.normal(key, (pages, 16, 1, 576), BF16))(jax.random.key(1))
    tables = layer_tables(layers, rows, width, pages)
    starts = jnp.asarray(np.concatenate([[0], np.cumsum([c[0] for c in chunks])]), jnp.int32)
    is_decode = tokens == rows

    def steps(q: jax.Array, pool: jax.Array, tables: list[jax.Array], starts: jax.Array, lens: jax.Array) -> jax.Array:
        attend = functools.partial(mosaic_gpu_latent.paged_attention, scale=0.07, value_dim=512, decode_only=is_decode)
        for table in tables:
            out = attend(q, pool, table, starts, lens, jnp.int32(rows if is_decode else 0))
            q = jnp.concatenate([out, q[..., 512:]], axis=-1)
        return q

    q = jax.random.normal(jax.random.key(0), (tokens, n, 576)).astype(BF16)
    f, args = jax.jit(steps), (q, pool, tables, starts, jnp.asarray(lens, jnp.int32))
    seconds = wall(f, args, 5) / layers
    device, rest = device_us(f, args, "latent_decode" if is_decode else "latent_prefill")
    num_bytes, flops = sum(lens) * 1152, sum(2 * n * 1088 * (new * before + new * (new + 1) // 2) for new, before in chunks)
    return {
        "case": name, "us": seconds * 1e6, "device_us": device, "gbps": num_bytes / device / 1e3,
        "of_copy": num_bytes / device * 1e6 / copy, "tflops": flops / device / 1e6, "rest_us": rest,
    }  # fmt: skip


def latent_times(copy: float) -> list[Callable[[], dict[str, Any]]]:
    cases = [(1, 256), (1, 8192), (16, 1024), (64, 256), (64, 4096), (256, 256), (256, 1024)]
    out = [(f"latent 16 heads B {b} x {length}", [(1, length - 1)] * b, 16) for b, length in cases]
    out += [(f"latent 128 heads B {b} x 4096", [(1, 4095)] * b, 128) for b in (1, 64)]
    out += [("latent prefill 2 x 4096", [(4096, 0)] * 2, 16), ("latent prefill 512 after 7680", [(512, 7680)], 16)]
    return [functools.partial(time_latent, name, chunks, n=n, copy=copy) for name, chunks, n in out]


def decode_times(copy: float) -> list[Callable[[], dict[str, Any]]]:
    out = []

    def add(name: str, lens: list[int], **kw: Any) -> None:
        out.append(functools.partial(time_decode, name, lens, copy=copy, **kw))

    for heads in (32, 16):
        for b, length in [(1, 256), (1, 8192), (8, 256), (8, 2048), (8, 8192), (64, 256), (64, 4096), (256, 256), (256, 1024)]:
            add(f"{heads}/8 B {b} x {length}", [length] * b, n=heads)
    ragged = np.random.default_rng(5).integers(16, 4097, 128).tolist()
    add("32/8 B 128 16..4096", ragged)
    add("32/8 B 64 x 4096 page 64", [4096] * 64, page=64)
    add("32/8 B 64 x 4096 of 8192", [4096] * 64, max_len=8192)
    add("32/8 B 64 x 8192 window 1024", [8192] * 64, window=1024, layers=4)
    for heads in (16, 32):  # 2 and 4 a kv head
        for b, own in [(64, 128), (256, 96)]:
            for shares_pages in (False, True):
                name = f"{heads}/8 B {b} x 2048 in common + {own}{', read once' if shares_pages else ''}"
                add(name, [2048 + own] * b, n=heads, prefix=2048, shares_pages=shares_pages)
        add(f"{heads}/8 B 64 x 4096, looks for common pages", [4096] * 64, n=heads, shares_pages=True)
    add("64/8 h64 B 64 x 4096", [4096] * 64, n=64, h=64)
    add("16/8 h256 B 64 x 2048", [2048] * 64, n=16, h=256)
    add("32/8 B 64 x 4096 e4m3", [4096] * 64, dtype=E4M3)
    add("32/8 B 256 x 256 e4m3", [256] * 256, dtype=E4M3)
    return out


def split_times(copy: float) -> list[Callable[[], dict[str, Any]]]:
    out = []
    for b, length in [(1, 2048), (1, 8192), (8, 2048), (8, 8192), (64, 4096), (256, 1024)]:
        for split in (128, 256, 512, 1024):
            if b * length / split <= 2048:
                name = f"32/8 B {b} x {length} split {split}"
                out.append(functools.partial(time_decode, name, [length] * b, split=split, copy=copy))
    return out


def prefill_times(_: float) -> list[Callable[[], dict[str, Any]]]:
    out = []

    def add(name: str, chunks: list[tuple[int, int]], **kw: Any) -> None:
        out.append(functools.partial(time_prefill, name, chunks, **kw))

    add("32/8 1 x 4096", [(4096, 0)])
    add("32/8 4 x 4096", [(4096, 0)] * 4)
    add("32/8 16 x 4096", [(4096, 0)] * 16)
    add("32/8 16 x 4096 page 64", [(4096, 0)] * 16, page=64)
    add("32/8 16 x 4096 page 128", [(4096, 0)] * 16, page=128)
    add("32/8 4 x 1024", [(1024, 0)] * 4)
    add("32/8 16 x 1024", [(1024, 0)] * 16)
    add("32/8 8 x 512", [(512, 0)] * 8)
    add("32/8 64 x 128", [(128, 0)] * 64)
    add("32/8 1 x 16384", [(16384, 0)])
    add("32/8 2048 after 14336", [(2048, 14336)])
    add("32/8 512 after 7680", [(512, 7680)])
    add("16/8 16 x 4096", [(4096, 0)] * 16, n=16)
    add("64/8 h64 8 x 4096", [(4096, 0)] * 8, n=64, h=64)
    add("16/8 h256 8 x 4096", [(4096, 0)] * 8, n=16, h=256)
    add("32/8 4 x 4096 window 1024", [(4096, 0)] * 4, window=1024)
    add("32/8 4 x 4096 softcap", [(4096, 0)] * 4, softcap=50.0)
    add("32/8 16 x 4096 e4m3", [(4096, 0)] * 16, dtype=E4M3)
    add("32/8 1 x 4096 e4m3", [(4096, 0)], dtype=E4M3)
    add("32/8 512 after 7680 e4m3", [(512, 7680)], dtype=E4M3)
    add("64/8 h64 8 x 4096 e4m3", [(4096, 0)] * 8, n=64, h=64, dtype=E4M3)
    add("32/8 16 x 4096 stages 3 block 64", [(4096, 0)] * 16, config=PrefillConfig(block=64, stages=4))
    return out


def show(result: dict[str, Any]) -> None:
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) if k == "case" else f"{k} {v}" for k, v in result.items()), flush=True)  # fmt: skip


def attempt(f: Any) -> dict[str, Any]:
    try:
        return f()
    except Exception as error:  # noqa: BLE001 - one failure must not lose the rest
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return {"case": str(f.args[0]), "ok": False, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main() -> None:
    sections = {"decode": decode_times, "prefill": prefill_times, "split": split_times, "latent": latent_times}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=["checks", *sections])
    parser.add_argument("--match", default="", help="only cases whose name has a match of this pattern")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder of kernels.json")
    args = parser.parse_args()
    begin = time.time()
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(figures, flush=True)
    path = pathlib.Path(args.out) / "kernels.json"
    if "checks" in args.only:
        cases = [c for c in check_cases() if re.search(args.match, c.args[0])]
        with ThreadPoolExecutor(6) as pool:  # compiles side by side
            figures["checks"] = list(pool.map(attempt, cases))
        for r in figures["checks"]:
            show(r)
        print(f"checks: {sum(r['ok'] for r in figures['checks'])} of {len(cases)} ok, {time.time() - begin:.0f} s", flush=True)
    copy = 1.0
    for name in [s for s in sections if s in args.only]:
        if copy == 1.0:
            copy = copy_bandwidth()
            figures["copy_gbps"] = copy / 1e9
            print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
        figures[name] = []
        for case in sections[name](copy):
            if re.search(args.match, case.args[0]):
                figures[name].append(attempt(case))
                show(figures[name][-1])
                path.write_text(json.dumps(figures, indent=1))
        random_pool.cache_clear()
    path.write_text(json.dumps(figures, indent=1))
    print(f"{time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
