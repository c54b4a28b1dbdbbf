"""Packer: writes a StepPlan into the buffer that is sent to the device. Keeps each slot's sampling parameters; knows no device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.buckets import Buckets
from jaxserve.plan import NO_TARGET, NOBODYS, ON_DEVICE, POSITION, SAMPLE_FIELDS, SLOT, TARGET, PlanBuffer
from jaxserve.step_plan import SampleRow, StepPlan

NOBODY = (0, NOBODYS, 1)  # slot, position and tokens of a row that is nobody's: it has no keys


class Packer:
    """Packs plans, strictly in the order in which they run."""

    def __init__(self, buckets: Buckets, num_slots: int) -> None:
        self._buckets = buckets
        self._num_slots = num_slots
        self._sample_fields = np.zeros((num_slots, SAMPLE_FIELDS), np.int32)

    def pack(self, plan: StepPlan, sampled: Sequence[SampleRow]) -> PlanBuffer:
        """The plan in a buffer of the smallest size that holds it; `sampled` is plan.sample_rows()."""
        for request in plan.placed:
            self._sample_fields[request.slot] = request.sample_fields
            self._sample_fields[request.slot, SLOT] = request.slot
        sizes = plan.num_rows, plan.num_tokens, plan.num_samples, plan.num_page_updates
        shape = self._buckets.choose(*sizes, is_repeated=bool(plan.ahead))
        buffer = PlanBuffer(shape, self._num_slots, self._buckets.plan_size)
        self._pack_decodes(plan, buffer)
        self._pack_pages(plan, buffer)
        if plan.rows:
            self._pack_rows(plan, buffer)
        if sampled:
            self._pack_sampled(sampled, len(plan.decodes), buffer)
        return buffer

    def _pack_decodes(self, plan: StepPlan, buffer: PlanBuffer) -> None:
        count = len(plan.decodes)
        slots = np.array([request.slot for request in plan.decodes], np.int32)
        steps = np.ones(count, np.int32)
        for requests in plan.ahead:
            steps[plan.places(requests)] += 1
        start = np.array([request.num_computed for request in plan.decodes], np.int32) - steps
        buffer.token_ids[:count] = ON_DEVICE
        buffer.row_slot[:count] = slots
        buffer.row_position[:count] = start
        buffer.row_tokens[:count] = steps
        buffer.num_single_rows[0] = count
        buffer.logit_rows[:count] = np.arange(count)
        buffer.samples[:count] = self._sample_fields[slots]
        buffer.samples[:count, POSITION] = start + 1

    def _pack_pages(self, plan: StepPlan, buffer: PlanBuffer) -> None:
        """The changes of page tables."""
        width = self._buckets.pages_per_slot
        page_index: list[int] = []
        page_id: list[int] = []
        for number in range(self._buckets.num_tables):
            first = number * self._num_slots  # of this column's tables on the device
            for request in plan.grown:
                pages = request.table.columns[number].pages
                page_index.append((first + request.slot) * width + len(pages) - 1)
                page_id.append(pages[-1])
            for row in plan.rows:
                entries, table = row.new_entries[number], (first + row.request.slot) * width
                page_index += range(table + entries.start, table + entries.stop)
                page_id += row.request.table.columns[number].pages[entries.start : entries.stop]
        buffer.page_index[: len(page_index)] = page_index
        buffer.page_id[: len(page_id)] = page_id

    def _pack_rows(self, plan: StepPlan, buffer: PlanBuffer) -> None:
        """Tokens and places of the rows, and where their logits are."""
        token_ids: list[int] = []
        logit_rows: list[int] = []
        first = len(plan.decodes)
        num_single = sum(row.num_tokens == 1 for row in plan.rows)
        gap = self._buckets.gap(first + num_single, plan.num_rows, plan.num_tokens, buffer.shape)
        places = [(row.request.slot, row.start, row.num_tokens) for row in plan.rows]
        places[num_single:num_single] = [NOBODY] * gap
        for number, row in enumerate(plan.rows):
            if number == num_single:
                token_ids += [0] * gap
            at = first + len(token_ids)
            token_ids += row.request.token_ids[row.start : row.start + row.num_tokens] or (ON_DEVICE,)
            logit_rows += range(at, at + row.num_targets)
            logit_rows += [at + row.num_tokens - 1] * len(row.samples)
        end = first + len(places)
        buffer.token_ids[first : first + len(token_ids)] = token_ids
        buffer.row_slot[first:end], buffer.row_position[first:end], buffer.row_tokens[first:end] = zip(*places, strict=True)
        buffer.num_single_rows[0] += num_single + gap
        buffer.logit_rows[first : first + len(logit_rows)] = logit_rows

    def _pack_sampled(self, sampled: Sequence[SampleRow], first: int, buffer: PlanBuffer) -> None:
        samples = buffer.samples[first : first + len(sampled)]
        samples[:] = self._sample_fields[[row.request.slot for row in sampled]]
        samples[:, POSITION] = [row.position for row in sampled]
        targets = np.array([row.target for row in sampled], np.int32)
        samples[:, TARGET] = targets
        samples[targets != NO_TARGET, SLOT] = self._num_slots  # these rows sample nothing
