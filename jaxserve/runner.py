"""The device side of the engine: weights, state and compiled programs; packs a StepPlan, dispatches it, brings results back.

Nothing here waits for the device except `collect`, and nothing eager runs between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxserve.models.interface import CacheSpec
from jaxserve.pallas_kernels.paged_attention import kv_pages_shape
from jaxserve.plan import ON_DEVICE, POSITION, SAMPLE_FIELDS, SLOT, PlanBuffer
from jaxserve.programs import Buckets, ProgramInputs, Programs
from jaxserve.request import Request
from jaxserve.sampler import Mode
from jaxserve.scheduler import StepPlan
from jaxserve.sharding import Shardings
from jaxserve.step import DeviceState, Weights

MODES = list(Mode)


@dataclass(frozen=True)
class InFlight:
    """A dispatched step whose results are on their way to the host.

    Attributes:
        requests: who gets the sampled tokens, in the order of the sample rows.
    """

    plan: StepPlan
    requests: list[Request]
    outputs: dict[str, jax.Array]


class Runner:
    """Runs steps, strictly in order, on one mesh."""

    def __init__(self, weights: Weights, programs: Programs, buckets: Buckets, inputs: ProgramInputs) -> None:
        self.programs = programs
        self.buckets = buckets
        self._inputs = inputs
        self._weights = weights
        self._sample_fields = np.zeros((inputs.num_slots, SAMPLE_FIELDS), np.int32)
        self._zeros = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (inputs.state, inputs.array((inputs.num_slots,)))),
            out_shardings=jax.tree.map(lambda x: x.sharding, (inputs.state, inputs.array((inputs.num_slots,)))),
        )
        self.reset()

    def reset(self) -> None:
        """A fresh state: a step that raised has lost the donated one."""
        self._state, self._last_tokens = self._zeros()

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Sends one step on its way; returns before the device has run it."""
        shape = self.buckets.choose(len(plan.rows), plan.num_tokens, plan.num_page_updates)
        buffer = PlanBuffer(shape, self._inputs.num_slots)
        requests = self._pack(plan, buffer)
        packed = jax.device_put(buffer.packed, self._inputs.shardings.replicated)
        self._state, logits, samples = self.programs.forward[shape](self._weights, self._state, self._last_tokens, packed)
        outputs: dict[str, jax.Array] = {}
        if requests:
            mode = max((r.mode for r in requests), key=MODES.index)
            program = self.programs.sample[shape.num_samples, mode]
            self._last_tokens, outputs = program(logits, self._last_tokens, samples)
            for output in outputs.values():
                output.copy_to_host_async()
        return InFlight(plan, requests, outputs)

    @staticmethod
    def collect(step: InFlight) -> dict[str, NDArray[np.generic]]:
        """Waits for a step's results."""
        return {name: np.asarray(output) for name, output in step.outputs.items()}

    def shutdown(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._state, self._last_tokens)):
            array.delete()
        self._weights = ()

    def _assign_slot(self, request: Request) -> None:
        """Keeps the sampling parameters of a request that has just got its slot."""
        self._sample_fields[request.slot] = request.sample_fields
        self._sample_fields[request.slot, SLOT] = request.slot

    def _pack(self, plan: StepPlan, buffer: PlanBuffer) -> list[Request]:
        """Writes the plan into the buffer; returns who is sampled, in order."""
        requests: list[Request] = []
        positions: list[int] = []
        at, update = 0, 0
        for i, row in enumerate(plan.rows):
            request, end = row.request, row.start + row.num_tokens
            if row.new_pages == 0:  # its first row in this slot
                self._assign_slot(request)
            buffer.row_slot[i] = request.slot
            buffer.row_position[i] = row.start
            buffer.row_tokens[i] = row.num_tokens
            if row.start >= len(request.token_ids):
                buffer.token_ids[at] = ON_DEVICE
            else:
                buffer.token_ids[at : at + row.num_tokens] = request.token_ids[row.start : end]
            new_pages = request.pages[row.new_pages :]
            if new_pages:
                index = request.slot * self.buckets.pages_per_slot + row.new_pages
                buffer.page_index[update : update + len(new_pages)] = range(index, index + len(new_pages))
                buffer.page_id[update : update + len(new_pages)] = new_pages
                update += len(new_pages)
            at += row.num_tokens
            for sampled in row.samples:
                buffer.logit_rows[len(requests)] = at - 1
                requests.append(sampled)
                positions.append(end)
        buffer.num_single_rows[0] = sum(row.num_tokens == 1 for row in plan.rows)
        if requests:
            buffer.samples[: len(requests)] = self._sample_fields[[r.slot for r in requests]]
            buffer.samples[: len(requests), POSITION] = positions
        return requests


def abstract_state(
    specs: tuple[CacheSpec, ...], num_pages: int, page_size: int, num_slots: int, pages_per_slot: int, dtype: jnp.dtype, to: Shardings
) -> DeviceState:
    """Shapes and shardings of the state, without allocating it."""
    struct = partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=to.kv_pages)
    caches = tuple(struct(kv_pages_shape(num_pages, page_size, s.num_kv_heads, s.head_dim)) for s in specs)
    return DeviceState(caches, jax.ShapeDtypeStruct((num_slots, pages_per_slot), jnp.int32, sharding=to.replicated))


def page_bytes(specs: tuple[CacheSpec, ...], page_size: int, dtype: jnp.dtype, devices: int) -> int:
    """Bytes of one page on each device, all layers together."""
    values = sum(2 * s.num_kv_heads * s.head_dim * page_size for s in specs)
    return values * dtype.itemsize // devices
