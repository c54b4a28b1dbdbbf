"""The functional core: a model as pure functions of (weights, state, plan), to be called in your own jit and on your own mesh.

Nothing here schedules: you say which tokens of which slot run, and in which pages they keep their keys and values. The engine
is built on the same functions (step.py). jaxserve/examples/functional_core.py is a whole generation in one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from jaxserve import step
from jaxserve.errors import ConfigError
from jaxserve.models.interface import MODEL_AXIS, Runtime, StepBatch
from jaxserve.models.loading import ModelDescription, describe_model, load_weights, open_source, resolve_dtype
from jaxserve.pallas_kernels.paged_attention import choose_implementation
from jaxserve.plan import POSITION, SLOT, PlanBuffer, PlanShape
from jaxserve.request import RequestGroup, sample_fields
from jaxserve.runner import abstract_state
from jaxserve.sampler import Mode
from jaxserve.sampling_params import SamplingParams
from jaxserve.sharding import Shardings, kv_repeat
from jaxserve.step import DeviceState, ForwardResults, Weights


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step.

    Attributes:
        slot: where it keeps its page table, one for all layers, and its last token.
        start: position of the first of token_ids.
        token_ids: what is computed; plan.ON_DEVICE stands for the token sampled last in this slot.
        pages: the slot's page table from the first page on; only needed where it has changed.
        params: how the token after the last is sampled: temperature, top_k, top_p, min_p.
        seed: with the token's position it makes the noise.
    """

    slot: int
    start: int
    token_ids: Sequence[int]
    pages: Sequence[int] = ()
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    seed: int = 0


@dataclass(frozen=True)
class Core:
    """What is static: the model and the sizes of its state.

    Attributes:
        num_slots: sequences that can be in the state at once.
        pages_per_slot: pages of the longest.
    """

    model: ModelDescription
    runtime: Runtime
    page_size: int
    num_pages: int
    num_slots: int
    pages_per_slot: int

    def init_state(self) -> DeviceState:
        """An empty pool, on the mesh. Donate it to the jit that takes it, and it is updated in place."""
        mesh = self.runtime.mesh
        assert mesh is not None, "load_core has given it one"
        sizes = self.num_pages, self.page_size, self.num_slots, self.pages_per_slot
        abstract = abstract_state(
            self.model.cache_specs, *sizes, self.model.abstract[0].dtype, Shardings(mesh, self.runtime.attention)
        )
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)
        state: DeviceState = make()
        return state

    def shape(self, num_tokens: int, num_rows: int) -> PlanShape:
        """The static sizes of a plan of so many tokens and rows, each of which is sampled."""
        return PlanShape(num_tokens, num_rows, num_rows, num_rows * self.pages_per_slot)

    def pack(self, rows: Sequence[Row], shape: PlanShape) -> NDArray[np.int32]:
        """The plan of a step, on the host; several of one shape may be stacked and scanned over.

        Args:
            rows: those with one token first.
            shape: holds them. With as many tokens as rows, each row must have one token.
        """
        buffer = PlanBuffer(shape, self.num_slots)
        changes = [(row.slot * self.pages_per_slot + i, page) for row in rows for i, page in enumerate(row.pages)]
        tokens = [token for row in rows for token in row.token_ids]
        counts = [len(row.token_ids) for row in rows]
        buffer.token_ids[: len(tokens)] = tokens
        buffer.row_slot[: len(rows)] = [row.slot for row in rows]
        buffer.row_position[: len(rows)] = [row.start for row in rows]
        buffer.row_tokens[: len(rows)] = counts
        buffer.num_single_rows[0] = counts.count(1)
        buffer.page_index[: len(changes)] = [index for index, _ in changes]
        buffer.page_id[: len(changes)] = [page for _, page in changes]
        buffer.logit_rows[: len(rows)] = np.cumsum(counts) - 1
        for i, row in enumerate(rows):
            buffer.samples[i] = sample_fields(RequestGroup("", [], row.params, 0, frozenset()), row.seed)
            buffer.samples[i, [SLOT, POSITION]] = row.slot, row.start + counts[i]
        return buffer.packed

    def forward(
        self,
        weights: Weights,
        state: DeviceState,
        last_tokens: Int[Array, " slots"],
        packed: Int[Array, " size"],
        shape: PlanShape,
    ) -> tuple[DeviceState, ForwardResults]:
        """Runs the model on the plan's tokens; to be traced. See step.forward."""
        return step.forward(
            weights,
            state,
            last_tokens,
            packed,
            apply_model=self.model.apply,
            runtime=self.runtime,
            shape=shape,
            page_size=self.page_size,
        )

    @staticmethod
    def sample(
        results: ForwardResults, last_tokens: Int[Array, " slots"], mode: Mode = Mode.FULL
    ) -> tuple[Int[Array, " slots"], Int[Array, " S"]]:
        """Samples a token for each row; to be traced.

        Returns:
            The last tokens by slot, for the next forward, and the tokens by row; -1 where the logits are not finite.
        """
        last_tokens, _, outputs = step.sample(results, last_tokens, None, mode=mode)
        return last_tokens, outputs["tokens"]

    def for_training(self) -> Self:
        """The same model with attention in plain jnp, which has a gradient; it gathers every key of every token."""
        return replace(self, runtime=replace(self.runtime, attention="reference"))

    def logits(self, weights: Weights, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Logits after every token of whole sequences, computed in one step; to be traced, and differentiated (for_training).

        The state is made and dropped inside.
        """
        count, length = tokens.shape
        pages = -(-length // self.page_size)
        own = replace(self, num_pages=count * pages, num_slots=count, pages_per_slot=pages)
        row, position = jnp.arange(count)[:, None], jnp.arange(length)
        batch = StepBatch(
            token_ids=tokens.ravel(),
            positions=jnp.tile(position, count),
            query_start=jnp.arange(count + 1) * length,
            kv_lens=jnp.full(count, length),
            page_tables=jnp.arange(count * pages).reshape(count, pages),
            write_slots=(row * pages * self.page_size + position).ravel(),
            num_single_rows=jnp.int32(count if length == 1 else 0),
            slots=jnp.arange(count),
            logit_rows=jnp.arange(count * length),
        )
        logits, _ = self.model.apply(weights, batch, own.init_state().caches, self.runtime)
        return logits.reshape(count, length, -1)


def load_core(
    model: str,
    mesh: Mesh,
    *,
    num_pages: int,
    num_slots: int,
    max_model_len: int,
    page_size: int = 16,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
) -> tuple[Core, Weights]:
    """A model for your own program, and its weights, placed on the mesh.

    Args:
        model: as for LLM.
        mesh: yours; its axis "model" cuts the layers, and whatever other axes it has see the same weights and state.
        num_pages, num_slots, max_model_len, page_size: sizes of the state.
        seed: of dummy weights.

    Raises:
        ConfigError: the mesh lacks the axis, or the model's heads do not spread over it.
        ModelLoadError: the model cannot be loaded.
    """
    if MODEL_AXIS not in mesh.shape:
        raise ConfigError(f"the mesh has the axes {', '.join(mesh.axis_names)}; one of them must be {MODEL_AXIS!r}")
    source, device = open_source(model, load_format), mesh.devices.flat[0]
    platform = cast(Literal["cpu", "gpu", "tpu"], device.platform)
    description = describe_model(
        source,
        dtype=resolve_dtype(dtype, platform, source),
        kv_repeat=lambda heads: kv_repeat(heads, mesh.shape[MODEL_AXIS]),
        context=max_model_len,
        outputs_first=platform == "cpu",
    )
    weights = load_weights(source, description, sharding_for=Shardings(mesh).of, seed=seed)
    runtime = Runtime(platform, mesh, choose_implementation(platform, device.device_kind))
    return Core(description, runtime, page_size, num_pages, num_slots, -(-max_model_len // page_size)), weights
