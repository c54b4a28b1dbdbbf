"""Checks of the GPU attention kernels against the reference, over pools whose unused slots hold NaN. For attention.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged_attention import mosaic_gpu, reference

BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn


def make_case(seed: int, queries: list[int], lens: list[int], *, tokens: int, n: int, k: int, h: int, page: int,
              dtype: Any = BF16, max_len: int | None = None, window: int | None = None, sinks: bool = False,
              prefix: int = 0) -> dict[str, Any]:  # fmt: skip
    """A pool in random page order. Unused pages, slots past a row's end, and pages before its window hold NaN in `poisoned`."""
    rng = np.random.default_rng(seed)
    rows = len(lens)
    counts = [-(-x // page) for x in lens]
    width = -(-(max_len or max(lens)) // page)
    total = sum(counts) + 3
    order = rng.permutation(total)
    table = np.full((rows, width), order[-1], np.int32)
    used = np.zeros((total, page), bool)
    at = 0
    for b, c in enumerate(counts):
        ids = order[at : at + c]
        at += c
        table[b, :c] = ids
        slots = np.arange(c * page).reshape(c, page)
        first = max(0, lens[b] - queries[b] + 1 - window) if window else 0
        used[ids] = (slots < lens[b]) & (slots[:, -1:] >= first)
    shared = prefix // page
    table[1:, :shared] = table[0, :shared]
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    kq, kk, ks = jax.random.split(jax.random.key(seed), 3)

    @jax.jit
    def pool(key: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(key, (total, page, 2 * k, h), BF16)
        clean = jnp.where(used[:, :, None, None], x, 0).astype(dtype)
        return clean, jnp.where(used[:, :, None, None], clean, jnp.asarray(jnp.nan, dtype))

    clean, poisoned = pool(kk, jnp.asarray(used))
    return {
        "q": (1.5 * jax.random.normal(kq, (tokens, n, h))).astype(BF16), "clean": clean, "poisoned": poisoned,
        "table": jnp.asarray(table), "starts": jnp.asarray(starts), "lens": jnp.asarray(lens, jnp.int32),
        "single": jnp.int32(sum(q == 1 for q in queries)), "sinks": jax.random.normal(ks, (n,)) if sinks else None,
    }  # fmt: skip


def check(name: str, seed: int, queries: list[int], lens: list[int], *, tokens: int | None = None, n: int = 32, k: int = 8,
          h: int = 128, page: int = 16, dtype: Any = BF16, window: int | None = None, softcap: float | None = None,
          sinks: bool = False, max_len: int | None = None, decode_only: bool = False, repeats: int = 5,
          prefix: int = 0) -> dict[str, Any]:  # fmt: skip
    """Relative error (Frobenius) to the float32 reference, over poisoned pools; repeats must agree bit for bit.

    With a prefix, whose pages all rows then have in common, so must the same with these pages read once.
    """
    tokens = tokens or max(sum(queries), 1)
    case = make_case(seed, queries, lens, tokens=tokens, n=n, k=k, h=h, page=page, dtype=dtype, max_len=max_len, window=window,
                     sinks=sinks, prefix=prefix)  # fmt: skip
    kw = {"scale": h**-0.5, "window": window, "softcap": softcap}
    args = (case["table"], case["starts"], case["lens"], case["single"], case["sinks"])
    f = functools.partial(mosaic_gpu.paged_attention, decode_only=decode_only, **kw)
    shared = functools.partial(f, shares_pages=True)
    runs = [
        np.asarray(g(case["q"], case["poisoned"], *args).astype(jnp.float32)) for g in [f] * repeats + [shared] * bool(prefix)
    ]
    ref = jax.jit(functools.partial(reference.paged_attention, **kw))
    want = np.array(ref(case["q"].astype(jnp.float32), case["clean"], *args))
    used = int(sum(queries))
    for b, length in enumerate(lens):
        if length == 0:
            want[int(case["starts"][b]) : int(case["starts"][b + 1])] = 0
    norm = float(np.linalg.norm(want[:used])) or 1.0
    error = float(np.linalg.norm(runs[0][:used] - want[:used])) / norm
    same = all(np.array_equal(runs[0], r) for r in runs[1:])
    finite = bool(np.isfinite(runs[0]).all())
    ok = error < 4e-3 and same and finite
    worst = ""
    if not ok:
        per = np.linalg.norm((runs[0][:used] - want[:used]).reshape(used, -1), axis=1)
        worst = f"bad tokens {np.flatnonzero(~(per < 0.02 * norm / max(used, 1) ** 0.5))[:12].tolist()}"
    return {"case": name, "ok": bool(ok), "error": error, "bit_equal": same, "finite": finite, "note": worst}


def check_cases() -> list[Callable[[], dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def lens(b: int, top: int) -> list[int]:
        return rng.integers(1, top + 1, b).tolist()

    edges = [1, 63, 64, 65, 0, 700, 511, 512, 513, 1500]
    out: list[Callable[[], dict[str, Any]]] = []

    def dec(name: str, ls: list[int], **kw: Any) -> None:
        out.append(functools.partial(check, f"decode {name}", len(out), [1] * len(ls), ls, decode_only=True, **kw))

    def mix(name: str, pairs: list[tuple[int, int]], **kw: Any) -> None:
        out.append(functools.partial(check, f"mixed {name}", len(out), [p[0] for p in pairs], [p[0] + p[1] for p in pairs], **kw))

    dec("32/8 edges", edges)
    dec("32/8 B1 8192", [8191])
    dec("32/8 B1 20000", [20000])
    dec("32/8 B64", lens(64, 3000), max_len=4096)
    dec("16/8 B256 page 32", lens(256, 900), n=16, page=32)
    dec("8/8 B33 page 64", lens(33, 2000), n=8, page=64)
    dec("28/4 page 128", lens(33, 1500), n=28, k=4, page=128)
    dec("64/1", lens(33, 1500), n=64, k=1)
    dec("14/2 h64", lens(9, 2000), n=14, k=2, h=64)
    dec("12/12 h64", lens(9, 2000), n=12, k=12, h=64)
    dec("64/8 h64 sinks window", lens(17, 2000), n=64, h=64, sinks=True, window=128)
    dec("32/8 sinks", edges, sinks=True)
    dec("32/8 common pages", [2048 + x for x in lens(64, 700)], prefix=2048)
    dec("16/8 common pages sinks", [1024 + x for x in lens(40, 1200)], n=16, prefix=1024, sinks=True)
    dec("14/2 h64 common pages softcap", [1600 + x for x in lens(33, 900)], n=14, k=2, h=64, prefix=1600, softcap=5.0)
    dec("32/8 common pages e4m3", [2048 + x for x in lens(64, 900)], prefix=2048, dtype=E4M3)
    dec("16/8 h256 common pages", [1024 + x for x in lens(20, 900)], n=16, h=256, prefix=1024)
    dec("32/8 window 1000", [*edges, 3000, 5000], window=1000)
    dec("32/8 softcap", edges, softcap=5.0)
    dec("16/8 h256", lens(9, 2000), n=16, h=256)
    dec("16/8 h256 window softcap", lens(9, 3000), n=16, h=256, window=700, softcap=50.0)
    dec("32/8 e4m3", edges, dtype=E4M3)
    dec("32/8 e4m3 B64", lens(64, 2500), dtype=E4M3)
    dec("16/8 h256 e4m3", lens(7, 1500), n=16, h=256, dtype=E4M3)
    dec("14/2 h64 e4m3", lens(7, 1500), n=14, k=2, h=64, dtype=E4M3)
    ragged = [(1, 300), (1, 0), (1, 777), (5, 0), (130, 0), (64, 100), (2, 500), (333, 37), (8, 1000)]
    mix("ragged", ragged, tokens=600)
    mix("whole prompts", [(512, 0), (300, 0), (128, 0)])
    mix("one prompt", [(1000, 0)], tokens=1024)
    mix("chunk", [(256, 1500), (256, 300)], page=64)
    mix("unused rows", [*ragged[:6], (0, 0), (0, 0)], tokens=256)
    mix("window", [*ragged, (200, 900)], tokens=800, window=100)
    mix("window 1000", [(500, 700), (200, 2000)], window=1000)
    mix("softcap", ragged, tokens=600, softcap=5.0)
    mix("sinks", ragged, tokens=600, sinks=True)
    mix("h64 64/8 sinks window", ragged, tokens=600, n=64, h=64, sinks=True, window=128)
    mix("h64 14/2", ragged, tokens=600, n=14, k=2, h=64)
    mix("h256", ragged, tokens=600, n=16, h=256)
    mix("h256 window softcap", ragged, tokens=600, n=16, h=256, window=200, softcap=50.0)
    mix("e4m3", ragged, tokens=600, dtype=E4M3)
    mix("e4m3 window sinks", [*ragged, (200, 900)], tokens=800, window=100, sinks=True, dtype=E4M3)
    mix("e4m3 h64 14/2", ragged, tokens=600, n=14, k=2, h=64, dtype=E4M3)
    mix("e4m3 h256", ragged, tokens=600, n=16, h=256, dtype=E4M3)
    mix("28/4 page 128", ragged, tokens=600, n=28, k=4, page=128)
    mix("verify", [(1, 90), (4, 900), (8, 1234), (3, 10)], tokens=64)
    return out
