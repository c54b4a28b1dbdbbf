"""Times the sampler's programs on one GPU: PYTHONPATH=. python bench/kernels/sampler.py [--out FILE].

The programs as the engine declares them, on float32 logits of a vocabulary of 128,256, normal with a standard deviation of 3, peaked
as a model's or flat: microseconds a call back to back (the device's time with launches), and what the host takes to send one; `waits`
is the time to send it behind 20 ms of other work. Beside them the kernel that finds thresholds alone, and XLA in its place, and
how many rows of each case would keep other tokens by XLA's search (sums of top-p are rounded differently).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import sampler, shaping, step
from jaxserve.pallas_kernels.kept_tokens import least_kept, order_of
from jaxserve.plan import NO_TARGET, POSITION, SEED_LOW, SLOT, TARGET
from jaxserve.request import RequestGroup, sample_fields
from jaxserve.sampler import Mode
from jaxserve.sampling_params import SamplingParams

ASKED = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(temperature=0.7, top_k=50),
    "top-p": SamplingParams(temperature=0.7, top_p=0.9),
    "top-p, heat 1": SamplingParams(top_p=0.9),
    "top-k, top-p, min-p": SamplingParams(temperature=0.7, top_p=0.9, top_k=50, min_p=0.01),
    "min-p": SamplingParams(min_p=0.05),
    "each eighth top-p": SamplingParams(top_p=0.9),
    "penalties": SamplingParams(temperature=0.7, top_p=0.9, frequency_penalty=0.5),
    "log probabilities": SamplingParams(logprobs=5),
}
Arguments = tuple[Any, ...]


def results_of(asked: str, rows: int, logits: jax.Array) -> step.ForwardResults:
    def row(params: SamplingParams) -> Any:
        return sample_fields(RequestGroup("", [1], params, 16, frozenset()), 1)

    fields = np.tile(row(ASKED[asked]), (rows, 1))
    if "eighth" in asked:
        fields[np.arange(rows) % 8 > 0] = row(ASKED["temperature"])
    fields[:, SLOT] = fields[:, SEED_LOW] = np.arange(rows)
    fields[:, POSITION], fields[:, TARGET] = 5, NO_TARGET
    return step.ForwardResults(logits, jnp.asarray(fields))


def logits_of(rows: int, vocab: int) -> dict[str, jax.Array]:
    """Peaked: what text makes of a vocabulary, by Zipf's law with an exponent of 1.7, in random order."""
    normal = jax.random.normal(jax.random.key(rows), (rows, vocab))
    ranks = jnp.arange(1, vocab + 1, dtype=jnp.float32)
    peaked = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(jax.random.key(1), rows), -1.7 * jnp.log(ranks))
    return {"normal": 3 * normal, "peaked": peaked + 0.5 * normal, "flat": 0.1 * normal}


def state_of(mode: Mode, slots: int, vocab: int) -> shaping.Shaping | None:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shaping.shape_like(slots, vocab)) if mode.needs_shaping else None


def programs(sizes: list[int], vocab: int) -> dict[tuple[str, int], Callable[..., Any]]:
    """What is timed, by its name and number of rows; functions of (results, last tokens, shaping)."""
    found: dict[tuple[str, int], Callable[..., Any]] = {}
    for rows in reversed(sizes):
        found["sample", rows] = partial(step.sample, mode=Mode.FULL, implementation="mosaic_gpu")
        found["threshold", rows] = partial(threshold, implementation="mosaic_gpu")
    found["threshold by XLA", sizes[-1]] = partial(threshold, implementation="xla")
    found["everything, a block", sizes[1]] = partial(
        step.sample_block, rows=sizes[1], mode=Mode.LOGPROBS, implementation="mosaic_gpu"
    )
    return found


def threshold(results: step.ForwardResults, last: jax.Array, state: Any, *, implementation: Any) -> Any:
    """The thresholds alone, as a sample program's results."""
    cuts = sampler.cuts_of(results.samples)
    return last, state, least_kept(results.logits, cuts, implementation)


def measure(
    program: Any, arguments: tuple[Any, ...], last: jax.Array, state: Any, slow: Callable[[], jax.Array]
) -> dict[str, float]:
    """Microseconds: of a call among many, to send one, and to send one behind other work."""
    outputs: Any = None

    def send(count: int) -> None:
        nonlocal last, state, outputs
        for _ in range(count):
            last, state, outputs = program(*arguments, last, state)

    def timed(count: int, *, ends: bool) -> float:
        start = time.perf_counter()
        send(count)
        if ends:
            jax.block_until_ready(last)
        took = time.perf_counter() - start
        jax.block_until_ready(last)
        return took / count * 1e6

    timed(3, ends=True)
    found = {"us": min(timed(20, ends=True) for _ in range(3)), "send us": min(timed(5, ends=False) for _ in range(5))}
    busy = slow()
    last = last + 0 * busy.ravel()[0].astype(last.dtype)  # waits for it
    found["waits us"] = timed(1, ends=False)
    return {name: round(value, 1) for name, value in found.items()}


def cases(sizes: list[int]) -> list[tuple[str, int, str, str]]:
    """(program, rows, logits, asked), the most wanted first."""
    _, block, most = sizes
    found = [("sample", most, kind, "top-k, top-p, min-p") for kind in ("normal", "peaked", "flat")]
    found += [("sample", most, "normal", asked) for asked in ("temperature", "greedy")]
    found += [
        ("threshold", rows, kind, asked)
        for rows in reversed(sizes)
        for kind in ("normal", "peaked", "flat")
        for asked in ("top-k", "top-p", "top-k, top-p, min-p")
    ]
    found += [("threshold", most, "normal", asked) for asked in ("top-p, heat 1", "min-p", "each eighth top-p", "temperature")]
    found += [("sample", rows, kind, "top-k, top-p, min-p") for rows in sizes[:2] for kind in ("normal", "peaked")]
    found += [("sample", rows, "normal", "temperature") for rows in sizes[:2]]
    found += [("everything, a block", block, "normal", asked) for asked in ("log probabilities", "penalties")]
    return [*found, ("threshold by XLA", most, "normal", "top-k, top-p, min-p")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=3, default=[16, 64, 256])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--seconds", type=float, default=55, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin, device = time.perf_counter(), jax.devices()[0]
    is_gpu = device.platform == "gpu"
    size = 8192 if is_gpu else 128
    matrix = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 12, lambda _, y: (y @ x) / size, x))
    jax.block_until_ready(multiply(matrix))
    slots = args.rows[-1]
    logits = {rows: jax.jit(logits_of, static_argnums=(0, 1))(rows, args.vocab) for rows in args.rows}

    def fresh(name: str) -> tuple[jax.Array, Any]:
        return jnp.zeros(slots, jnp.int32), state_of(Mode.LOGPROBS if "everything" in name else Mode.FULL, slots, args.vocab)

    def arguments(name: str, rows: int, kind: str, asked: str) -> Arguments:
        if "block" not in name:
            return (results_of(asked, rows, logits[rows][kind]),)
        return tuple(results_of(asked, n, logits[n][kind]) for n in args.rows), jnp.array([2, 0])

    def compiled(name: str, rows: int, function: Callable[..., Any]) -> Any:
        of = arguments(name, rows, "normal", "greedy")
        if not is_gpu:
            function.keywords["implementation"] = "xla"  # type: ignore[attr-defined]
        return jax.jit(function, donate_argnums=(len(of), len(of) + 1)).lower(*of, *fresh(name)).compile()

    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "vocab": args.vocab, "cases": {}}

    def tell(name: str, found: dict[str, Any]) -> None:
        figures["cases"][name] = found
        print(f"{name:60}", found, flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n")

    pool = ThreadPoolExecutor(12)
    jobs = {key: pool.submit(compiled, *key, function) for key, function in programs(args.rows, args.vocab).items()}
    for name, rows, kind, asked in cases(args.rows):
        title = f"{name}, {rows} rows, {kind}, {asked}"
        if time.perf_counter() - begin > args.seconds:
            tell(title, {"left out": "for want of time"})
            continue
        try:
            of = arguments(name, rows, kind, asked)
            found: dict[str, Any] = measure(jobs[name, rows].result(), of, *fresh(name), partial(multiply, matrix))
            if name == "threshold" and rows == slots:
                found["rows not as XLA's"] = differing(jobs, rows, of[0], fresh(name))
        except Exception as error:  # noqa: BLE001  the others are still wanted
            found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        tell(title, found)
    pool.shutdown(wait=False, cancel_futures=True)


def differing(
    jobs: dict[tuple[str, int], Any], rows: int, results: step.ForwardResults, state: tuple[jax.Array, Any]
) -> list[int]:
    """How many tokens more or fewer than XLA's search each row keeps where it is not as many; at most 8 rows."""
    last, shaping = state
    thresholds = []
    for name in ("threshold", "threshold by XLA"):
        last, shaping, least = jobs[name, rows].result()(results, last, shaping)
        thresholds.append(least)
    order = order_of(results.logits * sampler.cuts_of(results.samples).scale[:, None])
    ours, xla = (np.asarray(jnp.sum(order >= least[:, None], axis=1)) for least in thresholds)
    return [int(d) for d in (ours - xla)[ours != xla][:8]]


if __name__ == "__main__":
    main()
