"""The declared list of compiled programs: a sum of buckets, never a product. After `ready`, nothing else compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve import shaping, step
from jaxserve.models.interface import Runtime
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

    def decode_shape(self, num_rows: int) -> PlanShape:
        """The plan of a decode program: at most one new page a request."""
        return PlanShape(num_rows, num_rows, _at_least(self.samples, num_rows), num_rows)

    def mixed_shape(self, num_tokens: int) -> PlanShape:
        """The plan of a mixed program: new pages for its tokens, and one whole table for a prefix hit."""
        updates = self.max_num_seqs + num_tokens // self.page_size + self.pages_per_slot
        return PlanShape(num_tokens, self.max_num_seqs, self.max_num_seqs, updates)

    @property
    def shapes(self) -> list[PlanShape]:
        """Every forward program's plan, the largest first."""
        mixed = [self.mixed_shape(n) for n in reversed(self.tokens)]
        return mixed + [self.decode_shape(n) for n in reversed(self.decode)]

    def choose(self, num_rows: int, num_tokens: int, num_samples: int, num_page_updates: int) -> PlanShape:
        """The smallest plan that holds a step."""
        if num_rows == num_tokens:
            shape = self.decode_shape(_at_least(self.decode, num_rows))
            if num_samples <= shape.num_samples and num_page_updates <= shape.num_page_updates:
                return shape
        return next(
            shape
            for shape in map(self.mixed_shape, self.tokens)
            if num_tokens <= shape.num_tokens and num_page_updates <= shape.num_page_updates
        )


def choose_buckets(platform: str, max_num_seqs: int, max_num_batched_tokens: int, pages_per_slot: int, page_size: int) -> Buckets:
    """Buckets for the platform: a factor of 4 apart, since a padded decode row costs little beside the weights' traffic."""
    smallest = max(32 if platform == "cpu" else 256, max_num_seqs + 1)  # as many tokens as requests would mean decode
    decode = _geometric(max_num_seqs, 1, 4)
    few = decode[0] if platform == "cpu" or len(decode) == 1 else decode[-2]
    return Buckets(
        decode=decode,
        tokens=_geometric(max_num_batched_tokens, smallest, 4)[-3:],
        samples=tuple(sorted({few, max_num_seqs})),
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
class Programs:
    """The compiled programs, by what chooses them."""

    forward: Mapping[PlanShape, jax.stages.Compiled]
    sample: Mapping[tuple[int, Mode], jax.stages.Compiled]
    others: Mapping[str, jax.stages.Compiled]

    def __len__(self) -> int:
        return len(self.forward) + len(self.sample) + len(self.others)


@dataclass(frozen=True)
class ProgramInputs:
    """The abstract arguments that every program shares, with their shardings."""

    weights: tuple[jax.ShapeDtypeStruct, ...]
    state: step.DeviceState
    num_slots: int
    vocab_size: int
    page_size: int
    shardings: Shardings

    @property
    def shaping(self) -> shaping.Shaping:
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype), shaping.shape_like(self.num_slots, self.vocab_size))

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.shardings.replicated)


def lower_forward(shape: PlanShape, inputs: ProgramInputs, apply_model: step.ApplyModel, runtime: Runtime) -> jax.stages.Lowered:
    """One forward program, traced and lowered; the state is donated."""
    function = partial(step.forward, apply_model=apply_model, runtime=runtime, shape=shape, page_size=inputs.page_size)
    replicated = inputs.shardings.replicated
    state_shardings = jax.tree.map(lambda x: x.sharding, inputs.state)
    jitted = jax.jit(function, donate_argnums=1, out_shardings=(state_shardings, replicated, replicated))
    return jitted.lower(inputs.weights, inputs.state, inputs.array((inputs.num_slots,)), inputs.array((shape.size,)))


def lower_sample(num_samples: int, mode: Mode, inputs: ProgramInputs) -> jax.stages.Lowered:
    """One sample program, traced and lowered; what it keeps by slot is donated."""
    jitted = jax.jit(partial(step.sample, mode=mode), donate_argnums=(2, 3), out_shardings=inputs.shardings.replicated)
    logits = inputs.array((num_samples, inputs.vocab_size), jnp.float32)
    state = inputs.shaping if mode.needs_shaping else None
    return jitted.lower(logits, inputs.array((num_samples, SAMPLE_FIELDS)), inputs.array((inputs.num_slots,)), state)


def lower_set_shaping(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Writes one request's shaping row."""
    row = jax.tree.map(lambda x: inputs.array(x.shape, x.dtype), shaping.shape_like(inputs.vocab_size))
    jitted = jax.jit(shaping.set_row, donate_argnums=0, out_shardings=inputs.shardings.replicated)
    return jitted.lower(inputs.shaping, row, inputs.array(()))


def lower_copy_pages(inputs: ProgramInputs) -> jax.stages.Lowered:
    """Copies pages, at most one for each slot."""
    ids = inputs.array((inputs.num_slots,))
    jitted = jax.jit(step.copy_pages, donate_argnums=0, out_shardings=tuple(x.sharding for x in inputs.state.caches))
    return jitted.lower(inputs.state.caches, ids, ids)


def compile_programs(
    buckets: Buckets,
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
    work: list[tuple[dict[Any, jax.stages.Compiled], Any, Callable[[], jax.stages.Lowered]]] = []
    for shape in buckets.shapes:
        work.append((forward, shape, partial(lower_forward, shape, inputs, apply_model, runtime)))
    for num_samples in buckets.samples:
        for mode in Mode:
            work.append((sample, (num_samples, mode), partial(lower_sample, num_samples, mode, inputs)))
    work.append((others, "set_shaping", partial(lower_set_shaping, inputs)))
    work.append((others, "copy_pages", partial(lower_copy_pages, inputs)))

    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(lambda lower: lower().compile(), lower): (target, name) for target, name, lower in work}
        for done, job in enumerate(as_completed(jobs), start=1):
            target, name = jobs[job]
            target[name] = job.result()
            if on_progress is not None:
                on_progress("compile", done, len(jobs))
    return Programs(forward, sample, others)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Device memory that a program needs besides its arguments and what it returns in their place."""
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
