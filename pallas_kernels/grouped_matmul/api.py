"""Grouped matmul: how rows are laid out by group, and the choice of a back end. Knows arrays only, neither routers nor models."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention import Implementation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Where each item's row lies, so that every block of rows is of one group.

    R rows are made of n items; a group's last block may have rows of no item.

    Attributes:
        source: [R], the item of each row; any for a row of no item.
        place: [n], the row of each item; R for an item of no group.
        sizes: [E], rows of each group, a multiple of the block.
        block_groups: [R / block], the group of each block in use.
        num_blocks: [1], blocks in use; they come first.
    """

    source: Int[Array, " R"]
    place: Int[Array, " n"]
    sizes: Int[Array, " E"]
    block_groups: Int[Array, " blocks"]
    num_blocks: Int[Array, " 1"]

    @property
    def of_row(self) -> Int[Array, " R"]:
        """The group of each row."""
        return jnp.repeat(self.block_groups, self.source.shape[0] // self.block_groups.shape[0])


def choose_block(num_items: int, num_groups: int, implementation: Implementation) -> int:
    """Rows a block. The GPU kernel multiplies 64 or 128 at a time, but what else happens to the rows should touch few of no item."""
    if implementation != "mosaic_gpu":
        return 1
    if num_items >= 128 * num_groups:
        return 128
    return next((block for block in (8, 16, 32) if num_items <= block // 2 * num_groups), 64)


def group_rows(group: Int[Array, " n"], num_groups: int, block: int) -> Groups:
    """Lays items out by their group; those of no group in range get no row.

    Args:
        group: of each item.
        block: rows that must be of one group.
    """
    (num_items,) = group.shape
    most = num_items if block == 1 else (min(num_groups, num_items) + num_items // block) * block
    is_some = (group >= 0) & (group < num_groups)
    group = jnp.where(is_some, group, num_groups)
    counts = jnp.sum(group[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    blocks = (counts + (block - 1)) // block
    start = (jnp.cumsum(blocks) - blocks) * block
    place = jnp.where(is_some, start.at[group].get(mode="clip") + _rank(group, counts), most)
    return Groups(
        source=jnp.zeros(most, jnp.int32).at[place].set(jnp.arange(num_items), mode="drop"),
        place=place,
        sizes=blocks * block,
        block_groups=jnp.zeros(most // block, jnp.int32).at[place // block].set(group, mode="drop"),
        num_blocks=jnp.sum(blocks, keepdims=True, dtype=jnp.int32),
    )


def _rank(group: Int[Array, " n"], counts: Int[Array, " E"]) -> Int[Array, " n"]:
    """How many earlier items are of the same group."""
    n = jnp.arange(group.shape[0])
    if group.shape[0] <= 1024:  # one kernel, where a sort is several
        return jnp.sum((group[:, None] == group) & (n[:, None] > n), axis=1, dtype=jnp.int32)
    order = jnp.argsort(group)
    first = (jnp.cumsum(counts) - counts).at[group[order]].get(mode="clip")
    return jnp.zeros_like(group).at[order].set(n - first)


def grouped_matmul(
    x: Float[Array, "R K"], w: Float[Array, "E K M"], groups: Groups, implementation: Implementation
) -> Float[Array, "R M"]:
    """Each row times its group's matrix; rows past all groups' are unspecified."""
    if implementation == "mosaic_gpu" and x.dtype == w.dtype == jnp.bfloat16:
        from jaxserve.pallas_kernels.grouped_matmul import mosaic_gpu

        if mosaic_gpu.serves(w.shape):
            out: Array = mosaic_gpu.grouped_matmul(x, w, groups.block_groups, groups.num_blocks)
            return out
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(x, w, groups.sizes, precision=precision, preferred_element_type=x.dtype)
