"""The functional core: pure functions of (weights, state, packed plan), usable in any JAX program on any mesh.

A step is two programs, chained on the device: `forward` gives logits of chosen rows, `sample` gives tokens by slot. Or one program
runs several decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve import sampler
from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.pallas_kernels.paged_attention import Implementation
from jaxserve.plan import NOBODYS, POSITION, SLOT, PlanShape, UnpackedPlan, apply_page_updates, step_batch, unpack
from jaxserve.shaping import Shaping

Weights = tuple[jax.Array, ...]
ApplyModel = Callable[[Weights, StepBatch, tuple[Array, ...], Runtime], tuple[Array, tuple[Array, ...]]]
"""(weights, batch, caches, runtime) -> (logits [S, V], caches)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What `forward` updates in place.

    Attributes:
        caches: one for each of the model's cache specs: pages, whose layout belongs to the kernels, or states by slot.
        page_tables: [slots, pages of the longest request]; with several columns a table, those of all slots one after the other.
        peers: StepBatch's; stays as it is.
    """

    caches: tuple[Array, ...]
    page_tables: Int[Array, "tables pages"]
    peers: Int[Array, "devices entries 2"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardResults:
    """What `forward` leaves for `sample`: logits of the plan's logit_rows, and the plan's sample rows."""

    logits: Float[Array, "S V"]
    samples: Int[Array, "S fields"]


def forward(
    weights: Weights,
    state: DeviceState,
    last_tokens: Int[Array, " slots"],
    packed: Int[Array, " size"],
    before: ForwardResults | None = None,
    *,
    apply_model: ApplyModel,
    runtime: Runtime,
    shape: PlanShape,
    page_size: int,
) -> tuple[DeviceState, ForwardResults]:
    """Runs the model on the plan's tokens; their keys and values are in the pool afterwards.

    Args:
        packed: the plan's buffer, at least shape.size long.
        before: earlier results, only to be donated: the new ones then take their place. A CUDA graph is replayed as it was
            recorded only while every address stays; updating one costs as much as launching its kernels one by one.

    Returns:
        The new state (the old one may be donated), and what `sample` needs, so that it depends on S alone.
    """
    plan = unpack(packed, shape)
    state = replace(state, page_tables=apply_page_updates(state.page_tables, plan))
    state, logits = _run_model(weights, state, last_tokens, plan, apply_model, runtime, page_size)
    return state, ForwardResults(logits, plan.samples)


def _run_model(
    weights: Weights,
    state: DeviceState,
    last_tokens: Int[Array, " slots"],
    plan: UnpackedPlan,
    apply_model: ApplyModel,
    runtime: Runtime,
    page_size: int,
) -> tuple[DeviceState, Float[Array, "S V"]]:
    batch = replace(step_batch(plan, state.page_tables, last_tokens, page_size), peers=state.peers)
    logits, caches = apply_model(weights, batch, state.caches, runtime)
    return replace(state, caches=caches), logits


def stage(packed: Int[Array, " size"], before: Int[Array, " size"]) -> Int[Array, " size"]:
    """Moves a plan that has just arrived to where the plan before it was (donated): see `forward` on addresses."""
    return packed + (before & 0)


def sample(
    results: ForwardResults,
    last_tokens: Int[Array, " slots"],
    shaping: Shaping | None,
    *,
    mode: sampler.Mode,
    is_branching: bool = False,
    implementation: Implementation = "xla",
) -> tuple[Int[Array, " slots"], Shaping | None, dict[str, Array]]:
    """Samples each row and keeps its token by slot for the next forward.

    Returns:
        last_tokens with the new tokens, the shaping state after them, and what the host reads: see sampler.sample.
    """
    out, shaping = sampler.sample(
        results.logits, results.samples, mode, shaping, is_branching=is_branching, implementation=implementation
    )
    return last_tokens.at[results.samples[:, SLOT]].set(out["tokens"], mode="drop"), shaping, out


def decode_repeatedly(
    weights: Weights,
    state: DeviceState,
    last_tokens: Int[Array, " slots"],
    packed: Int[Array, " size"],
    *,
    mode: sampler.Mode,
    apply_model: ApplyModel,
    runtime: Runtime,
    shape: PlanShape,
    page_size: int,
) -> tuple[DeviceState, Int[Array, " slots"], dict[str, Array]]:
    """Runs the model and samples, shape.num_steps times, each time with the tokens just sampled.

    Args:
        packed: a plan whose rows all decode; row_tokens is in how many of the steps each of them is.
        mode: one without shaping.

    Returns:
        The new state, the last tokens, and what the host reads: tokens [num_steps, S].
    """
    plan = unpack(packed, shape)
    state = replace(state, page_tables=apply_page_updates(state.page_tables, plan))

    def run(step: Array, carry: tuple[DeviceState, Array, Array]) -> tuple[DeviceState, Array, Array]:
        state, last_tokens, tokens = carry
        goes_on = step < plan.row_tokens
        position = jnp.where(goes_on, plan.row_position + step, NOBODYS)
        slot = jnp.where(goes_on, plan.row_slot, np.iinfo(np.int32).max)
        samples = plan.samples.at[:, POSITION].add(step).at[: shape.num_rows, SLOT].set(slot)
        now = replace(plan, row_position=position, row_tokens=jnp.minimum(plan.row_tokens, 1), samples=samples)
        state, logits = _run_model(weights, state, last_tokens, now, apply_model, runtime, page_size)
        results = ForwardResults(logits, samples)
        last_tokens, _, out = sample(results, last_tokens, None, mode=mode, implementation=runtime.attention)
        return state, last_tokens, tokens.at[step].set(out["tokens"])

    tokens = jnp.zeros((shape.num_steps, shape.num_samples), jnp.int32)
    state, last_tokens, tokens = lax.fori_loop(0, shape.num_steps, run, (state, last_tokens, tokens))
    return state, last_tokens, {"tokens": tokens}


def sample_block(
    results: tuple[ForwardResults, ...],
    place: Int[Array, " which_and_row"],
    last_tokens: Int[Array, " slots"],
    shaping: Shaping | None,
    *,
    rows: int,
    mode: sampler.Mode,
    is_branching: bool = False,
    implementation: Implementation = "xla",
) -> tuple[Int[Array, " slots"], Shaping | None, dict[str, Array]]:
    """Samples some rows of some results: one program for steps of every size.

    Args:
        results: of every size.
        place: which of the results, and the first row. Rows past the end are sampled for nobody.
        rows: how many.
    """
    wanted = place[1] + jnp.arange(rows)

    def rows_of(parts: list[Array], fill: int) -> Array:
        cut = [x.at[wanted].get(mode="fill", fill_value=fill) for x in parts]
        return lax.select_n(place[0], *cut) if len(cut) > 1 else cut[0]

    logits = rows_of([r.logits for r in results], 0)
    samples = rows_of([r.samples for r in results], np.iinfo(np.int32).max)  # a slot past the end
    cut = ForwardResults(logits, samples)
    return sample(cut, last_tokens, shaping, mode=mode, is_branching=is_branching, implementation=implementation)


def copy_entries(
    caches: tuple[Array, ...], sources: Int[Array, " copies"], targets: Int[Array, " copies"], *, chosen: tuple[bool, ...]
) -> tuple[Array, ...]:
    """Copies whole pages (copy on write), or the states of whole slots, in every chosen cache; a target past the end is no copy."""
    return tuple(
        cache.at[targets].set(cache[sources], mode="drop") if copied else cache
        for cache, copied in zip(caches, chosen, strict=True)
    )
