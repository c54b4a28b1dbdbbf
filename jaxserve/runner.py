"""The device side of the engine: weights, state and compiled programs; dispatches a StepPlan and brings its results back.

Nothing here waits for the device except `collect`, and nothing eager runs between steps.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import batched, chain
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxserve.models.interface import AnyCacheSpec, StateSpec
from jaxserve.packing import Packer
from jaxserve.pallas_kernels.collectives.peers import lend
from jaxserve.plan import SHAPED, PlanBuffer, PlanShape
from jaxserve.programs import MODES, ProgramInputs, Programs
from jaxserve.request import Request
from jaxserve.sampler import Mode
from jaxserve.shaping import Shaping
from jaxserve.sharding import Shardings
from jaxserve.small_arrays import leave_room
from jaxserve.step import DeviceState
from jaxserve.step_plan import StepPlan
from jaxserve.step_results import StepResults
from jaxserve.step_runner import InFlight
from jaxserve.weight_store import WeightStore


class Runner:
    """Runs steps, strictly in order, on one mesh. A StepRunner."""

    def __init__(self, weights: WeightStore, programs: Programs, inputs: ProgramInputs) -> None:
        self.programs = programs
        self.buckets = inputs.buckets
        self._inputs = inputs
        self._weights = weights
        self._packer = Packer(inputs.buckets, inputs.num_slots)
        self._modes = [programs.sample_mode(mode) for mode in MODES]
        # Which results and which of their rows a block is, for step.sample_block.
        sizes = enumerate(inputs.buckets.samples)
        starts = [(i, size, start) for i, size in sizes for start in range(0, size, inputs.buckets.block)]
        self._places = {(size, start): self._send(np.array([i, start], np.int32)) for i, size, start in starts}
        self._lent: list[jax.Array] = []
        self._make_state()
        # Of tokens and plans; only where addresses matter, which is to CUDA graphs.
        tokens, plan = 4 * inputs.buckets.samples[-1], 4 * inputs.buckets.plan_size
        small = {tokens, tokens * inputs.buckets.num_steps, plan} if "stage" in programs.compiled else set()
        self._room = leave_room(sorted(small), lambda size: self._send(np.zeros(size, np.uint8)))

    def warm_up(self) -> None:
        """Runs every program of a step twice; before any request, as it writes to a page. A GPU's first runs make CUDA graphs."""
        for shape in self.buckets.shapes * 2:
            plan = PlanBuffer(shape, self._inputs.num_slots, self.buckets.plan_size)
            plan.num_single_rows[0], plan.row_tokens[0] = (1, 1) if shape.is_decode else (0, 2)
            self.run(shape, plan.packed, None, 0)
            for mode in dict.fromkeys(self._modes) if shape.num_steps == 1 else ():
                self._sample(shape.num_samples, mode, 1)
        jax.block_until_ready(self._last_tokens)

    def reset(self) -> None:
        """A fresh state: a step that raised has lost the donated one."""
        self._delete_state()  # first what is left of it: there is no room for two
        self._make_state()

    def _make_state(self) -> None:
        fresh = self.programs.named("reset")()
        self._state, self._last_tokens, self._shaping, self._packed, results = fresh
        self._results = dict(zip(self.buckets.samples, results, strict=True))
        if self._state.peers is not None:
            self._lent, peers = lend(self._inputs.shardings.mesh, self._inputs.logits_bytes)
            self._state = replace(self._state, peers=peers)

    def _delete_state(self) -> None:
        arrays = jax.tree.leaves((self._state, self._last_tokens, self._shaping, self._packed, self._results))
        if self._lent:  # to which kernels may still write, as XLA does not know
            for array in arrays:
                with suppress(RuntimeError):  # a step that failed has taken it along
                    array.block_until_ready()
        for array in arrays + self._lent:
            array.delete()
        self._lent = []

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Sends one step on its way; returns before the device has run it."""
        if plan.page_copies:
            self._copy("copy_pages", plan.page_copies)
        if plan.forks and any(self._inputs.is_state):
            self._copy("copy_states", plan.forks)
        for request in plan.placed:
            if request.sample_fields[SHAPED]:
                self.set_shaping(request)
        rows = plan.sample_rows()
        buffer = self._packer.pack(plan, rows)
        sampled = plan.decodes + [row.request for row in rows]
        rank = max([request.mode_rank for request in sampled]) if sampled else 0
        blocks = self.run(buffer.shape, buffer.packed, self._modes[rank] if sampled else None, len(sampled))
        names = self._wanted(MODES[rank], sampled, blocks[0]) if sampled else ()
        outputs = {name: [block[name] for block in blocks] for name in names}
        for output in chain.from_iterable(outputs.values()):
            output.copy_to_host_async()
        return InFlight(plan, rows, outputs, self._weights.version)

    def run(self, shape: PlanShape, packed: NDArray[np.int32], mode: Mode | None, num_sampled: int) -> list[dict[str, jax.Array]]:
        """Runs the model on a packed plan, and samples unless mode is None.

        Returns:
            The sampler's outputs, of one block of rows after the other; of several steps, if the shape has so many.
        """
        sent, stage = self._send(packed), self.programs.compiled.get("stage")
        self._packed = sent if stage is None else stage(sent, self._packed)
        if shape.num_steps > 1:
            self._state, self._last_tokens, outputs = self.programs.forward(shape)(
                self._weights.arrays, self._state, self._last_tokens, self._packed
            )
            return [outputs]
        self._state, self._results[shape.num_samples] = self.programs.forward(shape)(
            self._weights.arrays, self._state, self._last_tokens, self._packed, self._results[shape.num_samples]
        )
        return [] if mode is None else self._sample(shape.num_samples, mode, num_sampled)

    def is_ready(self, step: InFlight) -> bool:
        """Whether the results are there."""
        return all(output.is_ready() for output in chain.from_iterable(step.outputs.values()))

    def collect(self, step: InFlight) -> StepResults:
        """Waits for a step's results."""
        return {
            name: np.asarray(blocks[0]) if len(blocks) == 1 else np.concatenate(blocks) for name, blocks in step.outputs.items()
        }

    def set_shaping(self, request: Request) -> None:
        """Writes the request's penalties and biases to its slot."""
        self.write_shaping(request.shaping_row(self._inputs.vocab_size), request.slot)

    def write_shaping(self, row: Shaping, slot: int) -> None:
        """Writes a row, from the host, to a slot."""
        sent = jax.tree.map(self._send, row)
        self._shaping = self.programs.named("set_shaping")(self._shaping, sent, self._send(np.int32(slot)))

    def shutdown(self) -> None:
        """Frees the device memory, that of the weights unless somebody else holds them too."""
        self._delete_state()
        self._weights.drop()

    def _send(self, array: NDArray[Any] | np.integer[Any]) -> jax.Array:
        return self._inputs.shardings.replicate(array)

    def _sample(self, num_samples: int, mode: Mode, num_sampled: int) -> list[dict[str, jax.Array]]:
        block = self.programs.sample_block(mode)
        if block is None:
            return [self._keep(mode, self.programs.sample(num_samples, mode), self._results[num_samples])]
        results = tuple(self._results.values())
        starts = range(0, num_sampled, self.buckets.block)
        return [self._keep(mode, block, results, self._places[num_samples, start]) for start in starts]

    def _keep(self, mode: Mode, program: jax.stages.Compiled, *of: Any) -> dict[str, jax.Array]:
        """Runs a sample program and keeps what it leaves for the next one."""
        shaping = self._shaping if mode.needs_shaping else None
        self._last_tokens, shaping, outputs = program(*of, self._last_tokens, shaping)
        self._shaping = self._shaping if shaping is None else shaping
        return cast(dict[str, jax.Array], outputs)

    def _wanted(self, mode: Mode, sampled: list[Request], outputs: dict[str, jax.Array]) -> list[str]:
        """Names of the outputs that the host will read."""
        if mode is not Mode.LOGPROBS:
            return ["tokens"]
        wants_all = any(request.wants_all_logprobs for request in sampled)
        return [name for name in outputs if wants_all or name != "all_logprobs"]

    def _copy(self, program: str, copies: list[tuple[int, int]]) -> None:
        for some in batched(copies, self._inputs.num_slots):
            sources = np.zeros(self._inputs.num_slots, np.int32)
            targets = np.full(self._inputs.num_slots, np.iinfo(np.int32).max, np.int32)
            sources[: len(some)], targets[: len(some)] = zip(*some, strict=True)
            self.copy(program, sources, targets)

    def copy(self, program: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        """Runs one of the programs that copy pages or states."""
        caches = self.programs.named(program)(self._state.caches, self._send(sources), self._send(targets))
        self._state = replace(self._state, caches=caches)


def abstract_state(
    specs: tuple[AnyCacheSpec, ...],
    num_pages: int,
    page_size: int,
    num_slots: int,
    pages_per_slot: int,
    dtype: jnp.dtype,
    to: Shardings,
    *,
    kv_dtype: jnp.dtype | None = None,
    num_tables: int = 1,
    peer_sums: bool = False,
) -> DeviceState:
    """Shapes and shardings of the state, without allocating it.

    Args:
        specs: one for each array.
        num_tables: columns of a request's page table.
        dtype: of recurrent states that ask for none, and of pages where kv_dtype does not say otherwise.
    """

    def cache(spec: AnyCacheSpec) -> Any:
        if isinstance(spec, StateSpec):
            shape = (num_slots, *spec.shape)
            return jax.ShapeDtypeStruct(shape, spec.dtype or dtype, sharding=to.of((None, *spec.axes), shape))
        sharding = to.kv_pages if spec.is_sharded else to.replicated
        shape = spec.pages_shape(num_pages, page_size, to.attention)
        return jax.ShapeDtypeStruct(shape, kv_dtype or dtype, sharding=sharding)

    tables: Any = jax.ShapeDtypeStruct((num_tables * num_slots, pages_per_slot), jnp.int32, sharding=to.replicated)
    devices = to.mesh.size
    peers: Any = jax.ShapeDtypeStruct((devices, devices + 1, 2), jnp.int32, sharding=to.by_device) if peer_sums else None
    return DeviceState(tuple(map(cache, specs)), tables, peers)


def page_bytes(specs: tuple[AnyCacheSpec, ...], page_size: int, dtype: jnp.dtype, to: Shardings) -> int:
    """Bytes of one page on each device, all layers together; 0 for a model that keeps nothing but states."""
    pages = (spec for spec in specs if not isinstance(spec, StateSpec))
    values = (spec.page_values(page_size, to.attention) // (to.mesh.size if spec.is_sharded else 1) for spec in pages)
    return sum(values) * dtype.itemsize
