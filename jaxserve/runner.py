"""The device side of the engine: weights, state and compiled programs; packs a StepPlan, dispatches it, brings results back.

Nothing here waits for the device except `collect`, and nothing eager runs between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxserve.models.interface import CacheSpec
from jaxserve.pallas_kernels.paged_attention import kv_pages_shape
from jaxserve.plan import NO_TARGET, ON_DEVICE, POSITION, SAMPLE_FIELDS, SHAPED, SLOT, TARGET, PlanBuffer
from jaxserve.programs import ProgramInputs, Programs
from jaxserve.request import Request
from jaxserve.sampler import Mode
from jaxserve.sharding import Shardings
from jaxserve.step import DeviceState, Weights
from jaxserve.step_plan import StepPlan

MODES = list(Mode)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Whose a sampled row of logits is.

    Attributes:
        position: of the token that the row gives.
        target: a prompt token whose log probability is asked; NO_TARGET where the row is sampled.
    """

    request: Request
    position: int
    target: int = NO_TARGET


@dataclass(frozen=True, slots=True)
class InFlight:
    """A dispatched step whose results are on their way to the host."""

    plan: StepPlan
    rows: list[SampleRow]
    outputs: dict[str, jax.Array]

    @property
    def is_ready(self) -> bool:
        """Whether the results are there."""
        return all(output.is_ready() for output in self.outputs.values())  # type: ignore[attr-defined]  # jax's stub lacks it


class Runner:
    """Runs steps, strictly in order, on one mesh."""

    def __init__(self, weights: Weights, programs: Programs, inputs: ProgramInputs) -> None:
        self.programs = programs
        self.buckets = inputs.buckets
        self._inputs = inputs
        self._weights = weights
        self._sample_fields = np.zeros((inputs.num_slots, SAMPLE_FIELDS), np.int32)
        self.reset()

    def reset(self) -> None:
        """A fresh state: a step that raised has lost the donated one."""
        fresh = self.programs.others["reset"]()
        self._state, self._last_tokens, self._shaping, self._packed, self._results = fresh

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Sends one step on its way; returns before the device has run it."""
        if plan.page_copies:
            self._copy_pages(plan.page_copies)
        shape = self.buckets.choose(len(plan.rows), plan.num_tokens, plan.num_samples, plan.num_page_updates)
        buffer = PlanBuffer(shape, self._inputs.num_slots, self.buckets.plan_size)
        rows = self._pack(plan, buffer)
        self._packed = self.programs.others["stage"](self._send(buffer.packed), self._packed)
        self._state, self._results[shape.num_samples] = self.programs.forward[shape](
            self._weights, self._state, self._last_tokens, self._packed, self._results[shape.num_samples]
        )
        return InFlight(plan, rows, self._sample(shape.num_samples, rows) if rows else {})

    @staticmethod
    def collect(step: InFlight) -> dict[str, NDArray[Any]]:
        """Waits for a step's results."""
        return {name: np.asarray(output) for name, output in step.outputs.items()}

    def set_shaping(self, request: Request) -> None:
        """Writes the request's penalties and biases to its slot."""
        row = jax.tree.map(self._send, request.shaping_row(self._inputs.vocab_size))
        slot = self._send(np.int32(request.slot))
        self._shaping = self.programs.others["set_shaping"](self._shaping, row, slot)

    def shutdown(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._state, self._last_tokens, self._shaping, self._packed, self._results)):
            array.delete()
        self._weights = ()

    def _send(self, array: NDArray[Any] | np.integer[Any]) -> jax.Array:
        sent: jax.Array = jax.device_put(array, self._inputs.shardings.replicated)
        return sent

    def _sample(self, num_samples: int, rows: list[SampleRow]) -> dict[str, jax.Array]:
        mode = MODES[max(row.request.mode_rank for row in rows)]
        program = self.programs.sample[num_samples, mode]
        shaping = self._shaping if mode.needs_shaping else None
        self._last_tokens, shaping, outputs = program(self._results[num_samples], self._last_tokens, shaping)
        self._shaping = self._shaping if shaping is None else shaping
        if not any(row.request.wants_all_logprobs for row in rows):
            outputs.pop("all_logprobs", None)
        for output in outputs.values():
            output.copy_to_host_async()
        return cast(dict[str, jax.Array], outputs)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        sources = np.zeros(self._inputs.num_slots, np.int32)
        targets = np.full(self._inputs.num_slots, np.iinfo(np.int32).max, np.int32)
        sources[: len(copies)], targets[: len(copies)] = zip(*copies, strict=True)
        caches = self.programs.others["copy_pages"](self._state.caches, self._send(sources), self._send(targets))
        self._state = DeviceState(caches, self._state.page_tables)

    def _place(self, request: Request) -> None:
        """Keeps the sampling parameters of a request that has just got its slot."""
        self._sample_fields[request.slot] = request.sample_fields
        self._sample_fields[request.slot, SLOT] = request.slot
        if request.sample_fields[SHAPED]:
            self.set_shaping(request)

    def _pack(self, plan: StepPlan, buffer: PlanBuffer) -> list[SampleRow]:
        """Writes the plan into the buffer; returns whose the sampled rows are, in order."""
        rows: list[SampleRow] = []
        token_ids: list[int] = []
        logit_rows: list[int] = []
        page_index: list[int] = []
        page_id: list[int] = []
        for row in plan.rows:
            request, start, end = row.request, row.start, row.start + row.num_tokens
            for placed in row.placed:
                self._place(placed)
            at = len(token_ids)
            token_ids += request.token_ids[start:end] or (ON_DEVICE,)
            if row.new_pages < len(request.pages):
                first = request.slot * self.buckets.pages_per_slot
                page_index += range(first + row.new_pages, first + len(request.pages))
                page_id += request.pages[row.new_pages :]
            for offset in range(row.num_targets):
                logit_rows.append(at + offset)
                position = start + offset + 1
                rows.append(SampleRow(request, position, request.token_ids[position]))
            for sampled in row.samples:
                logit_rows.append(len(token_ids) - 1)
                rows.append(SampleRow(sampled, end))
        count = len(plan.rows)
        buffer.token_ids[: len(token_ids)] = token_ids
        buffer.row_slot[:count] = [row.request.slot for row in plan.rows]
        buffer.row_position[:count] = [row.start for row in plan.rows]
        buffer.row_tokens[:count] = [row.num_tokens for row in plan.rows]
        buffer.num_single_rows[0] = int((buffer.row_tokens == 1).sum())
        buffer.page_index[: len(page_index)] = page_index
        buffer.page_id[: len(page_id)] = page_id
        buffer.logit_rows[: len(rows)] = logit_rows
        if rows:
            self._pack_samples(rows, buffer)
        return rows

    def _pack_samples(self, rows: list[SampleRow], buffer: PlanBuffer) -> None:
        samples = buffer.samples[: len(rows)]
        samples[:] = self._sample_fields[[row.request.slot for row in rows]]
        samples[:, POSITION] = [row.position for row in rows]
        targets = np.array([row.target for row in rows], np.int32)
        samples[:, TARGET] = targets
        samples[targets != NO_TARGET, SLOT] = self._inputs.num_slots  # these rows sample nothing


def abstract_state(
    specs: tuple[CacheSpec, ...],
    num_pages: int,
    page_size: int,
    num_slots: int,
    pages_per_slot: int,
    dtype: jnp.dtype,
    to: Shardings,
) -> DeviceState:
    """Shapes and shardings of the state, without allocating it."""
    struct: Any = partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=to.kv_pages)
    caches = tuple(struct(kv_pages_shape(num_pages, page_size, s.num_kv_heads, s.head_dim)) for s in specs)
    tables: Any = jax.ShapeDtypeStruct((num_slots, pages_per_slot), jnp.int32, sharding=to.replicated)
    return DeviceState(caches, tables)


def page_bytes(specs: tuple[CacheSpec, ...], page_size: int, dtype: jnp.dtype, devices: int) -> int:
    """Bytes of one page on each device, all layers together."""
    values = sum(2 * s.num_kv_heads * s.head_dim * page_size for s in specs)
    return values * dtype.itemsize // devices
