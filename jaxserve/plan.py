"""The plan of one step as one packed int32 buffer: written by the host, unpacked inside jit at static offsets.

The packed plan is the whole interface between control and compute. Floats travel as their bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

from jaxserve.models.interface import PagePlaces, StepBatch

ON_DEVICE = -1  # a token id that only the device knows: the last one sampled in the row's slot

NOBODYS = -1  # the position of a row with a token that is nobody's

NO_TARGET = -1  # the row is sampled; any other target is a given token whose log probability is asked

SLOT, POSITION, TARGET, SEED_LOW, SEED_HIGH, TEMPERATURE, TOP_K, TOP_P, MIN_P = range(9)
SHAPED, MIN_POSITION, PRESENCE, FREQUENCY, REPETITION = range(9, 14)
SAMPLE_FIELDS = 14
"""Fields of a sample row; those from TEMPERATURE on that are not counts are the bits of a float32."""


@dataclass(frozen=True)
class PlanShape:
    """The static sizes of one compiled forward program.

    Attributes:
        num_tokens: T, query tokens.
        num_rows: B, requests.
        num_samples: S, logits rows that are sampled.
        num_page_updates: changes to the page tables.
        num_steps: decode steps, one after the other; a row's `row_tokens` says how many of them are for it.
    """

    num_tokens: int
    num_rows: int
    num_samples: int
    num_page_updates: int
    num_steps: int = 1

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token in each step."""
        return self.num_tokens == self.num_rows

    @cached_property
    def sections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (offset, shape) in the packed buffer."""
        shapes: dict[str, tuple[int, ...]] = {
            "num_single_rows": (1,),
            "token_ids": (self.num_tokens,),
            "row_slot": (self.num_rows,),
            "row_position": (self.num_rows,),  # of the row's first token; negative: the row is nobody's
            "row_tokens": (self.num_rows,),
            "page_index": (self.num_page_updates,),  # (column * slots + slot) * pages a slot + index in its table
            "page_id": (self.num_page_updates,),
            "logit_rows": (self.num_samples,),
            "samples": (self.num_samples, SAMPLE_FIELDS),
        }
        sections, offset = {}, 0
        for name, shape in shapes.items():
            sections[name] = (offset, shape)
            offset += math.prod(shape)
        return sections

    @cached_property
    def size(self) -> int:
        offset, shape = self.sections["samples"]
        return offset + math.prod(shape)


class PlanBuffer:
    """A plan being written on the host: named views into one int32 array."""

    def __init__(self, shape: PlanShape, num_slots: int, size: int | None = None) -> None:
        """size: of the packed array, where it is longer than the plan."""
        self.shape = shape
        self.packed: NDArray[np.int32] = np.zeros(size or shape.size, np.int32)
        view = {n: self.packed[o : o + math.prod(s)].reshape(s) for n, (o, s) in shape.sections.items()}
        self.num_single_rows = view["num_single_rows"]
        self.token_ids = view["token_ids"]
        self.row_slot = view["row_slot"]
        self.row_position = view["row_position"]
        self.row_tokens = view["row_tokens"]
        self.page_index = view["page_index"]
        self.page_id = view["page_id"]
        self.logit_rows = view["logit_rows"]
        self.samples = view["samples"]
        self.page_index[:] = np.iinfo(np.int32).max  # unused updates and samples fall outside and are dropped
        self.samples[:, SLOT] = num_slots
        self.samples[:, TARGET] = NO_TARGET


@dataclass(frozen=True)
class UnpackedPlan:
    """The sections of a plan, as traced arrays."""

    num_single_rows: Int[Array, ""]
    token_ids: Int[Array, " T"]
    row_slot: Int[Array, " B"]
    row_position: Int[Array, " B"]
    row_tokens: Int[Array, " B"]
    page_index: Int[Array, " updates"]
    page_id: Int[Array, " updates"]
    logit_rows: Int[Array, " S"]
    samples: Int[Array, "S fields"]


def unpack(packed: Int[Array, " size"], shape: PlanShape) -> UnpackedPlan:
    """Cuts the packed buffer into its sections; inside jit."""
    parts = {n: packed[o : o + math.prod(s)].reshape(s) for n, (o, s) in shape.sections.items()}
    return UnpackedPlan(**parts | {"num_single_rows": parts["num_single_rows"][0]})


def apply_page_updates(page_tables: Int[Array, "tables pages"], plan: UnpackedPlan) -> Int[Array, "tables pages"]:
    """The page tables with the plan's changes."""
    return page_tables.reshape(-1).at[plan.page_index].set(plan.page_id, mode="drop").reshape(page_tables.shape)


def step_batch(
    plan: UnpackedPlan,
    page_tables: Int[Array, "tables pages"],
    last_tokens: Int[Array, " slots"],
    page_size: int,
) -> StepBatch:
    """What the model receives, from the plan and the state that stayed on the device.

    Args:
        page_tables: the first columns of all slots' tables, then the second ones, and so on.
    """
    num_tokens, num_rows = plan.token_ids.shape[0], plan.row_slot.shape[0]
    query_start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(plan.row_tokens)])
    token = jnp.arange(num_tokens)
    row = jnp.minimum(jnp.searchsorted(query_start, token, side="right", method="compare_all") - 1, num_rows - 1)
    in_use = (token < query_start[-1]) & (plan.row_position[row] >= 0)
    positions = jnp.where(in_use, plan.row_position[row] + token - query_start[row], 0)
    kv_lens = jnp.where((plan.row_tokens > 0) & (plan.row_position >= 0), plan.row_position + plan.row_tokens, 0)

    def places(tables: Int[Array, "slots pages"]) -> PagePlaces:
        row_tables = tables[plan.row_slot]
        page = row_tables[row, positions // page_size]
        return PagePlaces(row_tables, jnp.where(in_use, page * page_size + positions % page_size, np.iinfo(np.int32).max))

    num_slots = last_tokens.shape[0]
    first, *others = (places(page_tables[at : at + num_slots]) for at in range(0, page_tables.shape[0], num_slots))
    token_ids = jnp.where(plan.token_ids == ON_DEVICE, last_tokens[plan.row_slot[row]], plan.token_ids)
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        query_start=query_start,
        kv_lens=kv_lens,
        page_tables=first.page_tables,
        write_slots=first.write_slots,
        num_single_rows=plan.num_single_rows,
        slots=jnp.where(kv_lens > 0, plan.row_slot, np.iinfo(np.int32).max),
        logit_rows=plan.logit_rows,
        other_tables=tuple(others),
    )


def float_bits(x: float) -> int:
    """A float32 as the int32 with the same bits."""
    return int(np.float32(x).view(np.int32))


def bits_to_float(x: Int[Array, " S"]) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
