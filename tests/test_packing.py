"""Where a step's rows stand among its tokens: behind rows with one token, prompts begin where a GPU's tiles of queries do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.buckets import choose_buckets
from jaxserve.limits import Limits
from jaxserve.models.interface import StepBatch
from jaxserve.packing import Packer
from jaxserve.page_pool import PagePool
from jaxserve.pallas_kernels.paged_attention.mosaic_gpu_plan import ALIGN, TILE, plan_prefill
from jaxserve.plan import apply_page_updates, step_batch, unpack
from jaxserve.request import Request, RequestGroup
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import StepPlan

PAGE = 16
SLOTS = 24
BUCKETS = choose_buckets("gpu", SLOTS, 2048, pages_per_slot=64, page_size=PAGE)
LIMITS = Limits(SLOTS, BUCKETS.tokens[-1], BUCKETS.max_page_updates, token_sizes=BUCKETS.tokens, align=BUCKETS.align)


def add(scheduler: Scheduler, order: int, length: int) -> Request:
    """A request whose prompt's tokens are all its order."""
    group = RequestGroup(f"r{order}", [order] * length, SamplingParams(), max_output_tokens=8, stop_ids=frozenset())
    request = Request(group, 0, 0, (0, order))
    scheduler.add(request)
    return request


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def beside_decodes(num_decodes: int, lengths: list[int]) -> tuple[StepPlan, list[Request]]:
    """A step of so many decodes and whole prompts."""
    scheduler = Scheduler(LIMITS, PagePool(400), PAGE)
    for order in range(num_decodes):
        add(scheduler, order, 3)
    if num_decodes:
        schedule(scheduler)
    prompts = [add(scheduler, 100 + i, length) for i, length in enumerate(lengths)]
    plan = schedule(scheduler)
    assert (len(plan.decodes), len(plan.rows)) == (num_decodes, len(lengths))
    return plan, prompts


def batch_of(plan: StepPlan) -> StepBatch:
    """What the model receives."""
    buffer = Packer(BUCKETS, SLOTS).pack(plan, plan.sample_rows())
    unpacked = unpack(jnp.asarray(buffer.packed), buffer.shape)
    tables = apply_page_updates(jnp.zeros((SLOTS, BUCKETS.pages_per_slot), jnp.int32), unpacked)
    return step_batch(unpacked, tables, jnp.full(SLOTS, 7), PAGE)


def num_tiles(batch: StepBatch) -> int:
    tokens = batch.token_ids.shape[0]
    rows = batch.query_start, batch.kv_lens, batch.num_single_rows
    return int(plan_prefill(*rows, num_tokens=tokens, num_heads=1, num_kv_heads=1).num_items[0])


@pytest.mark.parametrize("num_decodes", range(10))
def test_prompts_beside_decodes_have_the_tiles_that_they_have_alone(num_decodes: int) -> None:
    lengths = [2 * TILE, 3 * TILE, TILE]
    assert num_tiles(batch_of(beside_decodes(num_decodes, lengths)[0])) == 6


def test_what_stands_between_belongs_to_nobody() -> None:
    """A decode, prompts of 1, 40 and 20 tokens: two rows with one token, six of nobody's, two others."""
    plan, prompts = beside_decodes(1, [40, 1, 20])
    batch = batch_of(plan)
    assert int(batch.num_single_rows) == ALIGN and batch.query_start[:11].tolist() == [*range(9), 48, 68]
    assert batch.kv_lens[:11].tolist() == [4, 1, *[0] * 6, 40, 20, 0]
    assert batch.slots[:10].tolist() == [0, prompts[1].slot, *[2**31 - 1] * 6, prompts[0].slot, prompts[2].slot]
    assert np.flatnonzero(batch.in_use).tolist() == [0, 1, *range(8, 68)]
    assert batch.token_ids[:68].tolist() == [7, 101, *[0] * 6, *[100] * 40, *[102] * 20]
    assert batch.positions[:68].tolist() == [3, 0, *[0] * 6, *range(40), *range(20)]
    assert batch.logit_rows[:4].tolist() == [0, 1, 47, 67]
    pages = np.asarray(batch.write_slots)[np.asarray(batch.in_use)] // PAGE
    assert len(set(pages.tolist())) == 1 + 1 + 3 + 2


def test_there_is_nobody_where_a_plan_has_no_room() -> None:
    shape = BUCKETS.mixed_shapes[2048]
    assert BUCKETS.gap(3, 5, 100, shape) == 5
    assert BUCKETS.gap(3, 5, 2043, shape) == 5 and BUCKETS.gap(3, 5, 2044, shape) == 0
    assert BUCKETS.gap(3, SLOTS - 5, 100, shape) == 5 and BUCKETS.gap(3, SLOTS - 4, 100, shape) == 0
    assert BUCKETS.gap(5, 5, 5, shape) == 0, "no row has more than one token"
    assert BUCKETS.gap(0, 5, 100, shape) == BUCKETS.gap(8, 9, 100, shape) == 0
    for platform in ("cpu", "tpu"):
        assert choose_buckets(platform, SLOTS, 2048, pages_per_slot=64, page_size=PAGE).gap(3, 5, 100, shape) == 0
