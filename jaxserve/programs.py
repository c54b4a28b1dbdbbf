"""The declared list of compiled programs: a sum of buckets, never a product. After `ready`, nothing else compiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve import shaping, step
from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec
from jaxserve.plan import SAMPLE_FIELDS, PlanShape
from jaxserve.sampler import Mode
from jaxserve.sharding import Shardings

Progress = Callable[[str, int, int], None]
"""(stage, done, total): what start-up reports."""


@dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for, each ascending.

    Attributes:
        decode: requests of a step whose requests all have one token.
        tokens: tokens of any other step, with requests at their maximum.
        samples: rows that are sampled.
        pages_per_slot: entries of a request's page table.
    """

    decode: tuple[int, ...]
    tokens: tuple[int, ...]
    samples: tuple[int, ...]
    pages_per_slot: int
    page_size: int

    @property
    def max_num_seqs(self) -> int:
        return self.decode[-1]

    @cached_property
    def decode_shapes(self) -> dict[int, PlanShape]:
        """The plans of the decode programs, by requests: at most one new page a request."""
        return {n: PlanShape(n, n, _at_least(self.samples, n), n) for n in self.decode}

    @cached_property
    def mixed_shapes(self) -> dict[int, PlanShape]:
        """The plans of the mixed programs, by tokens: new pages for these, and one whole table for a prefix hit."""
        updates = self.max_num_seqs + self.pages_per_slot
        return {n: PlanShape(n, self.max_num_seqs, self.max_num_seqs, updates + n // self.page_size) for n in self.tokens}

    @property
    def shapes(self) -> list[PlanShape]:
        """Every forward program's plan, the largest first."""
        return [*reversed(self.mixed_shapes.values()), *reversed(self.decode_shapes.values())]

    @property
    def max_page_updates(self) -> int:
        """Changes of page tables that the largest plan carries."""
        return self.shapes[0].num_page_updates

    @cached_property
    def plan_size(self) -> int:
        """Length of a packed plan: all programs read from one buffer."""
        return max(shape.size for shape in self.shapes)

    def choose(self, num_rows: int, num_tokens: int, num_samples: int, num_page_updates: int) -> PlanShape:
        """The smallest plan that holds a step."""
        if num_rows == num_tokens:
            shape = self.decode_shapes[_at_least(self.decode, num_rows)]
            if num_samples <= shape.num_samples and num_page_updates <= shape.num_page_updates:
                return shape
        fitting = (s for s in self.mixed_shapes.values() if num_tokens <= s.num_tokens and num_page_updates <= s.num_page_updates)
        return next(fitting)


def choose_buckets(platform: str, max_num_seqs: int, max_num_batched_tokens: int, pages_per_slot: int, page_size: int) -> Buckets:
    """Buckets for the platform: a factor of 4 apart, since a padded decode row costs little beside the weights' traffic."""
    smallest = max(32 if platform == "cpu" else 256, max_num_seqs + 1)  # as many tokens as requests would mean decode
    # On a GPU a row alone is no faster than 16: XLA's kernels for vectors are slower than its matrix products.
    decode = _geometric(max_num_seqs, 1 if platform == "cpu" else min(16, max_num_seqs), 4)
    samples = {decode[0], max_num_seqs} if platform == "cpu" else {decode[0], *decode[-2:]}
    return Buckets(
        decode=decode,
        tokens=_geometric(max_num_batched_tokens, smallest, 4)[-3:],
        samples=tuple(sorted(samples)),
        pages_per_slot=pages_per_slot,
        page_size=page_size,
    )


def _geometric(largest: int, smallest: int, factor: int) -> tuple[int, ...]:
    sizes = {largest}
    size = largest // factor
    while size >= smallest:
        sizes.add(size)
        size //= factor
    return tuple(sorted(sizes | ({smallest} if smallest == 1 else set())))


def _at_least(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


@dataclass(frozen=True)
class ProgramReport:
    """What it took to compile a program, and the bytes that it needs on each device."""

    name: str
    seconds: float
    temp_bytes: int
    argument_bytes: int


@dataclass(frozen=True)
class Programs:
    """The compiled programs, by what chooses them."""

    forward: Mapping[PlanShape, jax.stages.Compiled]
    sample: Mapping[tuple[int, Mode], jax.stages.Compiled]
    others: Mapping[str, jax.stages.Compiled]
    reports: tuple[ProgramReport, ...] = ()

    def __len__(self) -> int:
        return len(self.forward) + len(self.sample) + len(self.others)


@dataclass(frozen=True)
class ProgramInputs:
    """The abstract arguments that every program shares, with their shardings.

    Attributes:
        cache_specs: of state.caches.
    """

    weights: tuple[jax.ShapeDtypeStruct, ...]
    state: step.DeviceState
    num_slots: int
    vocab_size: int
    buckets: Buckets
    shardings: Shardings
    cache_specs: tuple[AnyCacheSpec, ...]

    @property
    def is_state(self) -> tuple[bool, ...]:
        """Which caches are states by slot rather than pages."""
        return tuple(isinstance(spec, StateSpec) for spec in self.cache_specs)

    @property
    def last_tokens(self) -> jax.ShapeDtypeStruct:
        return self.array((self.num_slots,))

    @property
    def packed(self) -> jax.ShapeDtypeStruct:
        return self.array((self.buckets.plan_size,))

    def results(self, num_samples: int) -> step.ForwardResults:
        logits: Any = self.array((num_samples, self.vocab_size), jnp.float32)
        samples: Any = self.array((num_samples, SAMPLE_FIELDS))
        return step.ForwardResults(logits, samples)

    @property
    def shaping(self) -> shaping.Shaping:
        row = shaping.shape_like(self.num_slots, self.vocab_size)
        abstract: shaping.Shaping = jax.tree.map(lambda x: self.array(x.shape, x.dtype), row)
        return abstract

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.shardings.replicated)


def lower_forward(shape: PlanShape, inputs: ProgramInputs, apply_model: step.ApplyModel, runtime: Runtime) -> jax.stages.Lowered:
    """One forward program, traced and lowered; the state is donated."""
    page_size = inputs.buckets.page_size
    function = partial(step.forward, apply_model=apply_model, runtime=runtime, shape=shape, page_size=page_size)
    results = inputs.results(shape.num_samples)
    shardings = jax.tree.map(lambda x: x.sharding, (inputs.state, results))
    jitted = jax.jit(function, donate_argnums=(1, 4), out_shardings=shardings, keep_unused=True)
    return jitted.lower(inputs.weights, inputs.state, inputs.last_tokens, inputs.packed, results)


def lower_sample(num_samples: int, mode: Mode, inputs: ProgramInputs) -> jax.stages.Lowered:
    """One sample program, traced and lowered; what it keeps by slot is donated."""
    jitted = jax.jit(partial(step.sample, mode=mode), donate_argnums=(1, 2), out_shardings=inputs.shardings.replicated)
    state = inputs.shaping if mode.needs_shaping else None
    return jitted.lower(inputs.results(num_samples), inputs.last_tokens, state)


def lower_stage(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Puts a plan where the device programs expect it."""
    jitted = jax.jit(step.stage, donate_argnums=1, out_shardings=inputs.shardings.replicated)
    return jitted.lower(inputs.packed, inputs.packed)


def lower_set_shaping(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Writes one request's shaping row."""
    row = jax.tree.map(lambda x: inputs.array(x.shape, x.dtype), shaping.shape_like(inputs.vocab_size))
    jitted = jax.jit(shaping.set_row, donate_argnums=0, out_shardings=inputs.shardings.replicated)
    return jitted.lower(inputs.shaping, row, inputs.array(()))


def lower_copy_pages(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Copies pages, at most one for each slot."""
    return _lower_copies(inputs, tuple(not is_state for is_state in inputs.is_state))


def lower_copy_states(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Copies recurrent states from slot to slot."""
    return _lower_copies(inputs, inputs.is_state)


def _lower_copies(inputs: ProgramInputs, chosen: tuple[bool, ...]) -> jax.stages.Lowered:
    ids = inputs.array((inputs.num_slots,))
    shardings = tuple(x.sharding for x in inputs.state.caches)
    jitted = jax.jit(partial(step.copy_entries, chosen=chosen), donate_argnums=0, out_shardings=shardings, keep_unused=True)
    return jitted.lower(inputs.state.caches, ids, ids)


def lower_reset(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Makes all that stays on the device between steps: pool and page tables, last tokens, shaping, plan, results by size."""
    results = {n: inputs.results(n) for n in inputs.buckets.samples}
    state = (inputs.state, inputs.last_tokens, inputs.shaping, inputs.packed, results)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), out_shardings=shardings)
    return jitted.lower()


def compile_programs(
    inputs: ProgramInputs,
    apply_model: step.ApplyModel,
    runtime: Runtime,
    on_progress: Progress | None = None,
    threads: int = 8,
) -> Programs:
    """Compiles the whole list, in parallel: tracing shares Python, XLA's compiler does not."""
    forward: dict[PlanShape, jax.stages.Compiled] = {}
    sample: dict[tuple[int, Mode], jax.stages.Compiled] = {}
    others: dict[str, jax.stages.Compiled] = {}
    work: list[tuple[dict[Any, jax.stages.Compiled], Any, str, Callable[[], jax.stages.Lowered]]] = []
    for shape in inputs.buckets.shapes:
        name = f"decode {shape.num_rows}" if shape.num_tokens == shape.num_rows else f"forward {shape.num_tokens}"
        work.append((forward, shape, name, partial(lower_forward, shape, inputs, apply_model, runtime)))
    for num_samples in inputs.buckets.samples:
        for mode in Mode:
            name = f"sample {num_samples} {mode.value}"
            work.append((sample, (num_samples, mode), name, partial(lower_sample, num_samples, mode, inputs)))
    copies = (lower_copy_pages, lower_copy_states) if any(inputs.is_state) else (lower_copy_pages,)
    for lower in (lower_stage, lower_set_shaping, *copies, lower_reset):
        name = lower.__name__.removeprefix("lower_")
        work.append((others, name, name, partial(lower, inputs)))

    reports = []
    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(_compile, name, lower): (target, key) for target, key, name, lower in work}
        for done, job in enumerate(as_completed(jobs), start=1):
            target, key = jobs[job]
            target[key], report = job.result()
            reports.append(report)
            if on_progress is not None:
                on_progress("compile", done, len(jobs))
    return Programs(forward, sample, others, tuple(reports))


def _compile(name: str, lower: Callable[[], jax.stages.Lowered]) -> tuple[jax.stages.Compiled, ProgramReport]:
    started_s = time.monotonic()
    program = lower().compile()
    seconds, memory = time.monotonic() - started_s, program.memory_analysis()
    sizes = (0, 0) if memory is None else (memory.temp_size_in_bytes, memory.argument_size_in_bytes)
    return program, ProgramReport(name, seconds, *sizes)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Device memory that a program needs besides its arguments and what it returns in their place."""
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
