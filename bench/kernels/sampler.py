"""Times the sampler's programs on one GPU: PYTHONPATH=. python bench/kernels/sampler.py [--out FILE].

The programs as the engine declares them, on float32 logits of a vocabulary of 128,256: microseconds a call back to back (the
device's time with launches), and what the host takes to send one. Beside them what might be better: thresholds by other digits,
loops as part of the CUDA graph or unrolled, and the program that branches on the device, which is in the engine only if sending it
does not wait for what is before it (`waits`: the time to send it behind 20 ms of other work).
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
from jaxserve.plan import NO_TARGET, POSITION, SEED_LOW, SLOT, TARGET
from jaxserve.request import RequestGroup, sample_fields
from jaxserve.sampler import Mode
from jaxserve.sampling_params import SamplingParams

GRAPH = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"}
UNROLLED = {"xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_FULL_UNROLL"}
ASKED = {
    Mode.GREEDY: SamplingParams(temperature=0.0),
    Mode.PLAIN: SamplingParams(),
    Mode.FULL: SamplingParams(temperature=0.7, top_p=0.9, top_k=50, min_p=0.01),
    Mode.SHAPED: SamplingParams(temperature=0.7, top_p=0.9, frequency_penalty=0.5),
    Mode.LOGPROBS: SamplingParams(logprobs=5),
}
Case = tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]


def results_of(mode: Mode, rows: int, vocab: int) -> step.ForwardResults:
    fields = np.tile(sample_fields(RequestGroup("", [1], ASKED[mode], 16, frozenset()), 1), (rows, 1))
    fields[:, SLOT] = fields[:, SEED_LOW] = np.arange(rows)
    fields[:, POSITION], fields[:, TARGET] = 5, NO_TARGET
    return step.ForwardResults(3 * jax.random.normal(jax.random.key(rows), (rows, vocab)), jnp.asarray(fields))


def state_of(mode: Mode, slots: int, vocab: int) -> shaping.Shaping | None:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shaping.shape_like(slots, vocab)) if mode.needs_shaping else None


def with_digits(bits: int, *arguments: Any) -> Any:
    """Mode.FULL of whole results, with digits of so many bits; not to be traced beside others."""
    threshold = sampler._largest_threshold
    sampler._largest_threshold = partial(sampler._search, digit_bits=bits)
    try:
        return step.sample(*arguments, mode=Mode.FULL)
    finally:
        sampler._largest_threshold = threshold


def cases(sizes: list[int], vocab: int) -> dict[str, Case]:
    """Name -> (function, arguments but the last two, XLA's options), the most wanted first."""
    small, block, most = sizes
    found: dict[str, Case] = {}

    def add(name: str, function: Callable[..., Any], mode: Mode, rows: int, options: dict[str, str] | None = None) -> None:
        found[f"{name}, {rows} rows"] = function, (results_of(mode, rows, vocab),), options or {}

    for rows in (most, block, small):
        add("greedy and temperature", partial(step.sample, mode=Mode.PLAIN), Mode.PLAIN, rows)
    for mode in (Mode.FULL, Mode.LOGPROBS):
        everything = tuple(results_of(mode, rows, vocab) for rows in sizes)
        function = partial(step.sample_block, rows=block, mode=mode)
        found[f"{mode.value}, a block of {block} rows"] = function, (everything, jnp.array([2, 0])), {}
    for rows in (most, block):
        add("full", partial(step.sample, mode=Mode.FULL), Mode.FULL, rows)
        add("full, loops in the graph", partial(step.sample, mode=Mode.FULL), Mode.FULL, rows, GRAPH)
    add("full, loops unrolled", partial(step.sample, mode=Mode.FULL), Mode.FULL, block, UNROLLED)
    add("greedy alone", partial(step.sample, mode=Mode.GREEDY), Mode.GREEDY, most)
    for mode in (Mode.GREEDY, Mode.FULL):
        branching = partial(step.sample, mode=Mode.FULL, is_branching=True)
        add(f"branching, for {mode.value}", branching, mode, block)
        add(f"branching in the graph, for {mode.value}", branching, mode, block, GRAPH)
    for bits in (1, 2):
        add(f"full, digits of {bits} bits", partial(with_digits, bits), Mode.FULL, most)
    return found


def traced(case: Case, last: jax.Array, state: Any) -> Callable[[], Any]:
    """What compiles the case."""
    function, arguments, options = case
    jitted = jax.jit(function, donate_argnums=(len(arguments), len(arguments) + 1))
    return partial(jitted.lower(*arguments, last, state).compile, options)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=3, default=[16, 64, 256])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin, device = time.perf_counter(), jax.devices()[0]
    size = 8192 if device.platform == "gpu" else 128
    matrix = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 12, lambda _, y: (y @ x) / size, x))
    jax.block_until_ready(multiply(matrix))
    wanted = cases(args.rows, args.vocab)
    slots = args.rows[-1]

    def fresh(name: str) -> tuple[jax.Array, Any]:
        return jnp.zeros(slots, jnp.int32), state_of(Mode.LOGPROBS if "logprobs" in name else Mode.FULL, slots, args.vocab)

    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "vocab": args.vocab, "cases": {}}
    pool = ThreadPoolExecutor(12)
    programs = {name: pool.submit(traced(case, *fresh(name))) for name, case in wanted.items()}
    for name, (_, arguments, _) in wanted.items():
        if time.perf_counter() - begin > args.seconds:
            figures["cases"][name] = {"left out": "for want of time"}
            continue
        try:
            figures["cases"][name] = measure(programs[name].result(), arguments, *fresh(name), partial(multiply, matrix))
        except Exception as error:  # noqa: BLE001  the others are still wanted
            figures["cases"][name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        print(f"{name:45}", figures["cases"][name], flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n")
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
