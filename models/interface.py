"""What every model receives and declares: the step's batch, cache specs, the runtime, logical axis names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models.cache_layout import CacheLayout
from jaxserve.models.cache_spec import AnyCacheSpec, CacheKind, CacheSpec, StateSpec
from jaxserve.pallas_kernels import paged_attention as kernels
from jaxserve.pallas_kernels.collectives import all_gather, all_reduce

__all__ = [
    "MODEL_AXIS",
    "AnyCacheSpec",
    "CacheKind",
    "CacheSpec",
    "LogicalAxes",
    "PagePlaces",
    "Runtime",
    "ShardingFor",
    "StateSpec",
    "StepBatch",
]

LogicalAxes = tuple[str | None, ...]
"""One name for each dimension of a parameter; sharding.py maps names to mesh axes.

embed: model width D. vocab: V. heads/kv_heads: N/K. ffn: F. experts: E. None: never sharded.
"""

ShardingFor = Callable[[LogicalAxes, tuple[int, ...]], Sharding]
"""Gives the sharding of an array from its logical axes and its shape; handed to the loaders, which know no mesh."""

MODEL_AXIS = "model"  # the one mesh axis: tensor and expert parallelism


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagePlaces:
    """Where one page table leads; fields as in StepBatch."""

    page_tables: Int[Array, "B pages"]
    write_slots: Int[Array, " T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """The tokens of one step, packed: row b is one request, its query tokens are query_start[b]:query_start[b + 1].

    Rows with exactly one token come first (num_single_rows of them), so that kernels can treat them as decode; T = B says
    that there are no others.
    Padding tokens have position 0 and a write_slot past the pool; padding rows have kv_len 0 and no tokens, or one, if they stand
    among rows with one token or behind them.

    Attributes:
        token_ids: [T].
        positions: [T], of each token in its request.
        query_start: [B + 1].
        kv_lens: [B], keys of each request, this step's tokens included.
        page_tables: [B, pages of the longest request]; entries past kv_lens are never read.
        write_slots: [T], page * page_size + offset where the token's key and value go.
        num_single_rows: [], how many leading rows have exactly one token.
        slots: [B], where each row's request keeps its state; past the pool for padding rows.
        logit_rows: [S], which tokens' logits are wanted.
        other_tables: where requests have several page tables, the others than this first one.
        peers: where the devices' lent memory lies (kernels.collectives.peers), a row for each device, cut over them; None where
            XLA adds up what they have.
    """

    token_ids: Int[Array, " T"]
    positions: Int[Array, " T"]
    query_start: Int[Array, " B+1"]
    kv_lens: Int[Array, " B"]
    page_tables: Int[Array, "B pages"]
    write_slots: Int[Array, " T"]
    num_single_rows: Int[Array, ""]
    slots: Int[Array, " B"]
    logit_rows: Int[Array, " S"]
    other_tables: tuple[PagePlaces, ...] = ()
    peers: Int[Array, "devices entries 2"] | None = None

    def with_table(self, table: int) -> StepBatch:
        """What a layer receives whose pages are in one of the tables."""
        if table == 0:
            return replace(self, other_tables=())
        other = self.other_tables[table - 1]
        return replace(self, page_tables=other.page_tables, write_slots=other.write_slots, other_tables=())

    @property
    def is_decode(self) -> bool:
        """Whether no row has more than one token: row b's token is token b."""
        return self.token_ids.shape[0] == self.kv_lens.shape[0]

    @property
    def in_use(self) -> Bool[Array, " T"]:
        """Which tokens are no padding."""
        return self.write_slots < np.iinfo(np.int32).max

    @property
    def starts(self) -> Bool[Array, " B"]:
        """Which rows begin with their request's first token: whatever their slot holds is another request's."""
        return self.kv_lens == self.query_start[1:] - self.query_start[:-1]


@dataclass(frozen=True)
class Runtime:
    """Where the step runs: chosen once, static at trace time.

    Attributes:
        platform: "cpu", "gpu" or "tpu", the compile target; never asked of jax.devices() at trace time.
        mesh: the devices; kernels run under shard_map over its `model` axis.
        attention: the attention kernel's back end.
        layout: of the caches; None where each layer has its own array, and all one page table.
        shares_pages: decode reads pages that rows have in common once, where the back end can.
        peer_sums: GPUs add up what is small by writing into each other's memory, where layers say what there is to add.
    """

    platform: Literal["cpu", "gpu", "tpu"]
    mesh: Mesh | None = None
    attention: kernels.Implementation = "xla"
    layout: CacheLayout | None = None
    shares_pages: bool = False
    peer_sums: bool = False

    @property
    def has_one_device(self) -> bool:
        return self.num_devices == 1

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def rounding(self) -> kernels.Implementation:
        """What rounds activations to 8 bits. Several devices have parts of a row each, of which the kernel knows nothing."""
        return self.attention if self.has_one_device else "xla"

    @property
    def norms_sums(self) -> bool:
        """Whether kernels of norms also add up what comes before: a product's parts, GPUs' sums, the residual (models/late_sums.py)."""
        return self.sums_in_kernels or self.peer_sums

    @property
    def sums_in_kernels(self) -> bool:
        """Whether kernels add up what a product gives in parts: those of norms and of rope."""
        return self.attention == "mosaic_gpu"

    @property
    def rotates_and_writes(self) -> bool:
        """Whether a kernel does both at once, for which the layer keeps q, k and v as one."""
        return self.attention == "mosaic_gpu"

    def rotate_and_write(
        self,
        qkv: Float[Array, "... T K G+2 H"],
        rotation: tuple[Array, Array],
        kv_pages: Float[Array, "pages ..."],
        batch: StepBatch,
        scales: tuple[Array | None, Array | None] = (None, None),
        gains: tuple[Array, Array] | None = None,
        eps: float = 0.0,
        offset: float = 0.0,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "pages ..."]]:
        """Gives the rotated queries, and the pages with the rotated keys and the values; see the kernel's api.

        Args:
            scales: what the rows of qkv, and its columns, are yet to be multiplied by.
            gains, eps, offset: of an RMS norm of each query and of each key, which comes first.
        """
        f = partial(kernels.rotate_and_write, implementation=self.attention, eps=eps, offset=offset)
        heads, pool = P(None, MODEL_AXIS), pages_partition(self.attention)
        specs = (cut_at(qkv.ndim - 3, qkv.ndim), P(), P(), pool, P(), P(), P(MODEL_AXIS), P())
        arrays = (qkv, *rotation, kv_pages, batch.write_slots, *scales, gains)
        result: tuple[Array, Array] = self.sharded(f, specs, (heads, pool))(*arrays)
        return result

    def attend(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"] | None,
        v: Float[Array, "T K H"] | None,
        kv_pages: Float[Array, "pages ..."],
        batch: StepBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
        sinks: Float[Array, " N"] | None = None,
        alibi: Float[Array, " N"] | None = None,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "pages ..."]]:
        """Writes the step's keys and values, if they are given, to their pages, in place where donated; causal attention over these."""
        attend = partial(
            kernels.paged_attention,
            scale=scale,
            window=window,
            softcap=softcap,
            chunk=chunk,
            implementation=self.attention,
            shares_pages=self.shares_pages,
        )
        heads, pool, by_head = P(None, MODEL_AXIS, None), pages_partition(self.attention), P(MODEL_AXIS)
        specs = (heads, heads, heads, pool, *(P(),) * 5, by_head, by_head)
        arrays = (q, k, v, kv_pages, *_rows_of(batch), sinks, alibi)
        result: tuple[Array, Array] = self.sharded(attend, specs, (heads, pool))(*arrays)
        return result

    def attend_latent(
        self,
        q: Float[Array, "T N R"],
        latent: Float[Array, "T R"],
        pages: Float[Array, "pages ..."],
        batch: StepBatch,
        *,
        scale: float,
        value_dim: int,
    ) -> tuple[Float[Array, "T N V"], Float[Array, "pages ..."]]:
        """The same where a row is key and value in one for all heads; its first value_dim numbers are the value."""
        attend = partial(kernels.paged_attention, scale=scale, value_dim=value_dim, implementation=self.attention)
        heads = P(None, MODEL_AXIS, None)
        specs = (heads, *(P(),) * 8)
        arrays = (q, latent[:, None], None, pages, *_rows_of(batch))
        result: tuple[Array, Array] = self.sharded(attend, specs, (heads, P()))(*arrays)
        return result

    def sum_parts(
        self, multiply: Callable[[Array, Any], Array], x: Float[Array, "T ..."], w: Any, cut_w: Any, axis: int, batch: StepBatch
    ) -> Float[Array, "T D"]:
        """multiply(x, w), where each device may have a part of what they have in common.

        Args:
            cut_w: how w, or its arrays, are cut.
            axis: of x, cut over the devices if it divides by them.
        """
        if self.mesh is None or batch.peers is None or x.shape[axis] % self.mesh.size:
            return multiply(x, w)

        def local(x: Array, w: Any, peers: Array) -> Array:
            return all_reduce(multiply(x, w), peers, MODEL_AXIS)

        summed: Array = self.sharded(local, (cut_at(axis, x.ndim), cut_w, P(MODEL_AXIS)), P())(x, w, batch.peers)
        return summed

    def look_up(self, table: Float[Array, "V D"], batch: StepBatch) -> Float[Array, "T D"]:
        """The step's tokens' rows of a table that may be cut over the devices."""
        if self.mesh is None or batch.peers is None or table.shape[0] % self.mesh.size:
            return jnp.take(table, batch.token_ids, axis=0, mode="clip")

        def local(table: Array, token_ids: Array, peers: Array) -> Array:
            row = token_ids - jax.lax.axis_index(MODEL_AXIS) * table.shape[0]
            is_own = (row >= 0) & (row < table.shape[0])
            rows = jnp.where(is_own[:, None], jnp.take(table, row, axis=0, mode="clip"), 0)
            return all_reduce(rows, peers, MODEL_AXIS)

        rows: Array = self.sharded(local, (P(MODEL_AXIS), P(), P(MODEL_AXIS)), P())(table, batch.token_ids, batch.peers)
        return rows

    def gather_columns(
        self,
        multiply: Callable[[Array, Any, Array | None], Float[Array, "S P"]],
        x: Float[Array, "S D"],
        w: Any,
        bias: Float[Array, " V"] | None,
        cut_w: P,
        columns: int,
        batch: StepBatch,
    ) -> Float[Array, "S V"]:
        """multiply(x, w, bias), where each device may have a part of w's columns and of the bias.

        Args:
            cut_w: how w is cut, if its columns divide by the devices.
        """
        if self.mesh is None or batch.peers is None or columns % self.mesh.size:
            return multiply(x, w, bias)

        def local(x: Array, w: Any, bias: Array | None, peers: Array) -> Array:
            return all_gather(multiply(x, w, bias), peers, MODEL_AXIS)

        cuts = (P(), cut_w, P(MODEL_AXIS), P(MODEL_AXIS))
        gathered: Array = self.sharded(local, cuts, P())(x, w, bias, batch.peers)
        return gathered

    def over_experts(
        self, f: Callable[..., Array], tokens: tuple[Array, ...], arrays: tuple[Array | None, ...], batch: StepBatch
    ) -> Float[Array, "T D"]:
        """Sum over devices of f(*tokens, first, *arrays), where each device has the experts from `first` on.

        Args:
            arrays: each [E, ...], cut over the devices if E divides by them, else whole on all.
        """
        size = 1 if self.mesh is None else self.mesh.shape[MODEL_AXIS]
        assert arrays[0] is not None
        if size == 1 or arrays[0].shape[0] % size:
            return f(*tokens, jnp.int32(0), *arrays)
        count = arrays[0].shape[0] // size

        def local(peers: Array | None, *inputs: Array) -> Array:
            first = jax.lax.axis_index(MODEL_AXIS) * count
            return all_reduce(f(*inputs[: len(tokens)], first, *inputs[len(tokens) :]), peers, MODEL_AXIS)

        specs = (P(MODEL_AXIS), *(P() for _ in tokens), *(P(MODEL_AXIS) for _ in arrays))
        summed: Array = self.sharded(local, specs, P())(batch.peers, *tokens, *arrays)
        return summed

    def sharded(self, f: Callable[..., Any], in_specs: tuple[P, ...], out_specs: P | tuple[P, ...]) -> Callable[..., Any]:
        """f under shard_map, where there are several devices."""
        if self.has_one_device:
            return f
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def cut_at(axis: int, ndim: int) -> P:
    """An array cut over the devices along one axis."""
    return P(*(MODEL_AXIS if i == axis else None for i in range(ndim)))


def pages_partition(implementation: kernels.Implementation) -> P:
    """How a pool whose heads spread over devices is cut."""
    return cut_at(kernels.head_axis(implementation), 4)


def _rows_of(batch: StepBatch) -> tuple[Array, ...]:
    """What attention kernels ask of a batch."""
    return batch.write_slots, batch.page_tables, batch.query_start, batch.kv_lens, batch.num_single_rows
