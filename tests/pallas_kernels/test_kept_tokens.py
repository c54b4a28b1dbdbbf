"""What top-k, top-p and min-p keep: XLA's search and the GPU kernel, in the interpreter and on an NVIDIA GPU, against a sort."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.kept_tokens import Cuts, least_kept, mosaic_gpu, order_of, reference, xla
from jaxserve.pallas_kernels.paged_attention import Implementation

SLACK = 1e-5  # of a row's probability: sums of float32


@contextmanager
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_gpu, "append", _append)
        patch.setattr(plgpu, "layout_cast", lambda x, layout: x)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield


def _append(x: jax.Array, bound: jax.Array, count: jax.Array, kept: Any) -> jax.Array:
    """Stands in for what the interpreter has no words for."""
    lines, threads = kept.shape[0] * mosaic_gpu.EACH, mosaic_gpu.THREADS
    for mine in x.reshape(-1, threads):
        chosen, count_ = mine >= bound, count[:threads]
        at = jnp.where(chosen & (count_ < lines), count_, lines), jnp.arange(threads)
        kept[...] = kept[...].reshape(lines, threads).at[at].set(mine, mode="drop").reshape(kept.shape)
        count = jnp.tile(count_ + chosen, mosaic_gpu.EACH)
    return count


def check(logits: np.ndarray, asked: list[tuple[float, int, float, float]], implementation: Implementation) -> None:
    """Each row keeps what a sort keeps, but for tokens about which rounding decides; asked: temperature, top_k, top_p, min_p."""
    temperature, top_k, top_p, min_p = (np.array(x) for x in zip(*asked, strict=True))
    scale = np.float32(1) / temperature.astype(np.float32)
    arrays = scale, top_k.clip(max=2**31 - 1).astype(np.int32), top_p.astype(np.float32), min_p.astype(np.float32)
    cuts = Cuts(*map(jnp.asarray, arrays))
    least = np.asarray(jax.jit(partial(least_kept, implementation=implementation))(jnp.asarray(logits), cuts))
    for i, row in enumerate(logits * scale[:, None]):
        got = np.asarray(order_of(jnp.asarray(row))) >= least[i]
        options = int(top_k[i]), float(np.float32(top_p[i])), float(np.float32(min_p[i]))
        fewest, most = (reference.kept(row, *options, slack=slack) for slack in (-SLACK, SLACK))
        finite = np.isfinite(row)  # what is banned is never drawn, kept or not
        assert not (fewest & ~got & finite).any(), (i, asked[i], fewest.sum(), got.sum())
        assert not (got & ~most & finite).any(), (i, asked[i], most.sum(), got.sum())


def rows_of(kind: str, rows: int, vocab: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, vocab])
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    match kind:
        case "normal":
            logits *= 3
        case "flat":
            logits *= 0.01
        case "peaked":
            logits = np.float32(logits + 12 * (rng.random(logits.shape) < 5 / vocab) * rng.random(logits.shape))
        case "ties":
            logits = np.float32(rng.integers(-3, 4, logits.shape))
        case "equal":
            logits[:] = 1.5
        case "banned":
            logits[rng.random(logits.shape) < 0.95] = -np.inf
            logits[:, 3] = 0
        case "one left":
            logits[:, 1:] = -np.inf
    return logits


KINDS = ["normal", "flat", "peaked", "ties", "equal", "banned", "one left"]
ASKED = [
    (1.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.0, 10**9, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 0.999, 0.0),
    (0.6, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.8, 20, 0.95, 0.01),
    (1.0, 3000, 0.5, 0.0),
]


def every_case(vocab: int) -> tuple[np.ndarray, list[tuple[float, int, float, float]]]:
    return np.concatenate([rows_of(kind, len(ASKED), vocab, 1) for kind in KINDS]), ASKED * len(KINDS)


def test_xla_keeps_what_a_sort_keeps() -> None:
    check(*every_case(300), "xla")


@pytest.mark.parametrize("digit_bits", [1, 4])
def test_a_threshold_leaves_what_is_wanted(digit_bits: int) -> None:
    rng = np.random.default_rng(8)
    order = rng.integers(-(2**31), 2**31, (5, 300)).astype(np.int32)
    order[1], order[2, ::2] = 7, 2**31 - 1
    weights = rng.integers(0, 9, order.shape).astype(np.float32)
    wanted = np.array([0.3, 0.5, 0.1, 0.99, 1.0], np.float32) * weights.sum(-1)
    found = jax.jit(partial(xla.search, digit_bits=digit_bits))(*map(jnp.asarray, (order, weights, wanted)))
    for values, weight, want, threshold in zip(order, weights, wanted, np.asarray(found), strict=True):
        assert weight[values >= threshold].sum() >= want
        assert threshold == 2**31 - 1 or weight[values > threshold].sum() < want


FEW = [("normal", ASKED[9]), ("flat", ASKED[4]), ("ties", ASKED[2]), ("banned", ASKED[10]), ("peaked", ASKED[7])]


@pytest.mark.parametrize("depth", [50, 1], ids=["kept", "too much to keep"])
def test_kernel_in_the_interpreter(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, asked = np.concatenate([rows_of(kind, 1, 2700, 2) for kind, _ in FEW]), [asked for _, asked in FEW]
    check_interpreted(logits, asked, depth, monkeypatch)


def check_interpreted(
    logits: np.ndarray, asked: list[tuple[float, int, float, float]], depth: int, patch: pytest.MonkeyPatch
) -> None:
    """With sizes by which few tokens are a whole row."""
    for name, value in {"DEPTH": depth, "LINES": 2, "LANES": 1}.items():
        patch.setattr(mosaic_gpu, name, value)
    with interpreted():
        check(logits, asked, "mosaic_gpu")


@pytest.mark.extra
@settings(max_examples=10, deadline=None)
@given(
    vocab=st.sampled_from([512, 513, 1024, 2048, 2049, 5000]),
    seed=st.integers(0, 2**16),
    depth=st.integers(1, 8),
    rows=st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.tuples(
                st.floats(0.1, 4),
                st.sampled_from([-1, 0, 1, 2, 7, 500, 2048, 10**9]),
                st.one_of(st.just(1.0), st.floats(1e-6, 1)),
                st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
            ),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_kernel_keeps_what_a_sort_keeps(vocab: int, seed: int, depth: int, rows: list[Any]) -> None:
    logits = np.concatenate([rows_of(kind, 1, vocab, seed) for kind, _ in rows])
    with pytest.MonkeyPatch.context() as patch:
        check_interpreted(logits, [asked for _, asked in rows], depth, patch)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [600, 50257, 128256, 262144])
def test_kernel_on_the_gpu(vocab: int) -> None:
    check(*every_case(vocab), "mosaic_gpu")
