"""The declared list of compiled programs: a sum of buckets, never a product. After `ready`, nothing else compiles."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve import shaping, step
from jaxserve.buckets import Buckets
from jaxserve.models.interface import AnyCacheSpec, Runtime, StateSpec
from jaxserve.plan import SAMPLE_FIELDS, PlanShape
from jaxserve.sampler import Mode
from jaxserve.sharding import Shardings

MODES = list(Mode)

CompilerOptions = dict[str, str | bool]


@dataclass(frozen=True)
class ProgramReport:
    """What it took to make a program, and the bytes that it needs on each device.

    Attributes:
        trace_seconds: in Python, one program at a time; not saved by the compile cache.
        seconds: to trace and to compile, without those in which it waits to be traced.
        done_s: when it was done, by time.time().
        output_bytes: of results that take the place of no argument.
    """

    name: str
    trace_seconds: float
    seconds: float
    temp_bytes: int
    argument_bytes: int
    output_bytes: int = 0
    done_s: float = 0.0


@dataclass(frozen=True)
class Program:
    """A function to be compiled for abstract arguments.

    Attributes:
        key: what chooses it (PlanShape, (rows, Mode), a Mode for blocks of rows, or a name).
        donated: numbers of the arguments that its results take the place of.
        results: their abstract values, where the arguments do not tell them.
    """

    name: str
    key: Hashable
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    out_shardings: Any
    options: CompilerOptions = field(default_factory=dict)
    results: Any = None

    def jitted(self, function: Callable[..., Any] | None = None) -> jax.stages.Wrapped:
        """The function, or one in its place, with what is donated and where results go."""
        return jax.jit(function or self.function, donate_argnums=self.donated, out_shardings=self.out_shardings, keep_unused=True)


@dataclass(frozen=True)
class Programs:
    """The compiled programs, by their keys."""

    compiled: Mapping[Hashable, jax.stages.Compiled]
    reports: tuple[ProgramReport, ...] = ()

    def forward(self, shape: PlanShape) -> jax.stages.Compiled:
        return self.compiled[shape]

    def sample(self, num_samples: int, mode: Mode) -> jax.stages.Compiled:
        """Of a mode that sample_mode gives and that is not sampled in blocks."""
        return self.compiled[num_samples, mode]

    def sample_block(self, mode: Mode) -> jax.stages.Compiled | None:
        """The program that samples blocks of rows; None where the mode has programs for whole results."""
        return self.compiled.get(mode)

    def sample_mode(self, mode: Mode) -> Mode:
        """The least mode that there are programs for and that can do what this one does."""
        modes = {key[1] for key in self.compiled if isinstance(key, tuple)} | {
            key for key in self.compiled if isinstance(key, Mode)
        }
        return next(m for m in MODES[MODES.index(mode) :] if m in modes)

    def named(self, name: str) -> jax.stages.Compiled:
        return self.compiled[name]

    @property
    def temporary_bytes(self) -> int:
        """Device memory that the hungriest of them needs besides its arguments and what it returns in their place."""
        return max((temporary_bytes(program) for key, program in self.compiled.items() if key != "reset"), default=0)

    def __len__(self) -> int:
        return len(self.compiled)


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
    def logits_bytes(self) -> int:
        """Of the most rows that are sampled in a step."""
        return self.buckets.samples[-1] * self.vocab_size * 4

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


def declare_programs(inputs: ProgramInputs, apply_model: step.ApplyModel, runtime: Runtime) -> list[Program]:
    """Every program that the engine will ever run; forwards, which take longest to compile, come first."""
    forwards = [
        _forward(shape, inputs, apply_model, runtime) if shape.num_steps == 1 else _repeated(shape, inputs, apply_model, runtime)
        for shape in inputs.buckets.shapes
    ]
    # A branch on the device saves programs, for 0.1 ms a step on a CPU; on a GPU the host waits for what it depends on.
    how = {"is_branching": runtime.platform != "gpu", "implementation": runtime.attention}
    whole = whole_mode(runtime)
    blocks = [Mode.FULL, Mode.LOGPROBS] if whole is Mode.PLAIN else [Mode.LOGPROBS]
    samples = [_sample(n, whole, how, inputs) for n in inputs.buckets.samples]
    samples += [_sample_block(mode, how, inputs) for mode in blocks]
    stage = [_stage(inputs)] if runtime.platform == "gpu" else []  # addresses matter to CUDA graphs alone
    states = [_copies("copy_states", inputs, inputs.is_state)] if any(inputs.is_state) else []
    pages = _copies("copy_pages", inputs, tuple(not is_state for is_state in inputs.is_state))
    return [*forwards, *samples, *stage, _set_shaping(inputs), pages, *states, _reset(inputs)]


def whole_mode(runtime: Runtime) -> Mode:
    """The last mode that has programs for whole steps; those after it are sampled in blocks."""
    if runtime.platform != "gpu":
        return Mode.SHAPED
    return Mode.FULL if runtime.attention == "mosaic_gpu" else Mode.PLAIN  # XLA's search would cost those rows too that want none


def _forward(shape: PlanShape, inputs: ProgramInputs, apply_model: step.ApplyModel, runtime: Runtime) -> Program:
    """Runs the model; the state is donated."""
    page_size = inputs.buckets.page_size
    function = partial(step.forward, apply_model=apply_model, runtime=runtime, shape=shape, page_size=page_size)
    results = inputs.results(shape.num_samples)
    return Program(
        name=f"decode {shape.num_rows}" if shape.is_decode else f"forward {shape.num_tokens}",
        key=shape,
        function=function,
        arguments=(inputs.weights, inputs.state, inputs.last_tokens, inputs.packed, results),
        donated=(1, 4),
        out_shardings=jax.tree.map(lambda x: x.sharding, (inputs.state, results)),
        options=_compiler_options(shape, runtime),
    )


def _repeated(shape: PlanShape, inputs: ProgramInputs, apply_model: step.ApplyModel, runtime: Runtime) -> Program:
    """Runs several decode steps, and samples in each; state and last tokens are donated."""
    state, replicated = jax.tree.map(lambda x: x.sharding, inputs.state), inputs.shardings.replicated
    function = partial(
        step.decode_repeatedly,
        apply_model=apply_model,
        runtime=runtime,
        shape=shape,
        page_size=inputs.buckets.page_size,
        mode=whole_mode(runtime),
    )
    return Program(
        name=f"decode {shape.num_rows} x {shape.num_steps}",
        key=shape,
        function=function,
        arguments=(inputs.weights, inputs.state, inputs.last_tokens, inputs.packed),
        donated=(1, 2),
        out_shardings=(state, replicated, replicated),
        options=_compiler_options(shape, runtime),
    )


def _compiler_options(shape: PlanShape, runtime: Runtime) -> CompilerOptions:
    """XLA's options for a forward program.

    From 256 tokens up, cuBLAS alone is as fast as the better of it and Triton, adds the residual within the product, and saves
    the seconds that choosing takes (87 s for one 8-bit program, measured on an H100). Kernels that wait for other GPUs share flags, so
    none may run beside another, as it could where a layer has two sums that do not need each other. Weights and pages alone are more
    than the share of a GPU's memory that XLA plans with, so it would compute small arrays anew for each layer, to save nothing.
    """
    if runtime.platform != "gpu":
        return {}
    options: CompilerOptions = {"xla_disable_hlo_passes": "rematerialization"}
    if runtime.peer_sums:
        options["xla_gpu_command_buffer_scheduling_mode"] = "SERIALIZE"
    if shape.num_tokens >= 256:
        options["xla_gpu_enable_triton_gemm"] = False
    return options


def _sample(num_samples: int, mode: Mode, how: dict[str, Any], inputs: ProgramInputs) -> Program:
    """Samples rows; what it keeps by slot is donated."""
    return Program(
        name=f"sample {num_samples} {mode.value}",
        key=(num_samples, mode),
        function=partial(step.sample, mode=mode, **how),
        arguments=(
            inputs.results(num_samples),
            inputs.last_tokens,
            inputs.shaping if mode.needs_shaping else None,
        ),
        donated=(1, 2),
        out_shardings=inputs.shardings.replicated,
    )


def _sample_block(mode: Mode, how: dict[str, Any], inputs: ProgramInputs) -> Program:
    """Samples some rows of results of any size; what it keeps by slot is donated."""
    results = tuple(inputs.results(n) for n in inputs.buckets.samples)
    shaping = inputs.shaping if mode.needs_shaping else None
    return Program(
        name=f"sample {mode.value}",
        key=mode,
        function=partial(step.sample_block, rows=inputs.buckets.block, mode=mode, **how),
        arguments=(results, inputs.array((2,)), inputs.last_tokens, shaping),
        donated=(2, 3),
        out_shardings=inputs.shardings.replicated,
    )


def _stage(inputs: ProgramInputs) -> Program:
    """Puts a plan where the device programs expect it."""
    replicated = inputs.shardings.replicated
    return Program("stage", "stage", step.stage, (inputs.packed, inputs.packed), donated=(1,), out_shardings=replicated)


def _set_shaping(inputs: ProgramInputs) -> Program:
    """Writes one request's shaping row."""
    row = jax.tree.map(lambda x: inputs.array(x.shape, x.dtype), shaping.shape_like(inputs.vocab_size))
    arguments = (inputs.shaping, row, inputs.array(()))
    replicated = inputs.shardings.replicated
    return Program("set_shaping", "set_shaping", shaping.set_row, arguments, donated=(0,), out_shardings=replicated)


def _copies(name: str, inputs: ProgramInputs, chosen: tuple[bool, ...]) -> Program:
    """Copies pages, or recurrent states, at most one for each slot."""
    ids = inputs.array((inputs.num_slots,))
    shardings = tuple(x.sharding for x in inputs.state.caches)
    function = partial(step.copy_entries, chosen=chosen)
    return Program(name, name, function, (inputs.state.caches, ids, ids), donated=(0,), out_shardings=shardings)


def _reset(inputs: ProgramInputs) -> Program:
    """Makes all that stays on the device between steps: pool and page tables, last tokens, shaping, plan, results by size."""
    results = [inputs.results(n) for n in inputs.buckets.samples]
    state = (inputs.state, inputs.last_tokens, inputs.shaping, inputs.packed, results)

    def reset() -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return Program("reset", "reset", reset, (), donated=(), out_shardings=shardings, results=state)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Device memory that it needs besides its arguments and what it returns in their place."""
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
