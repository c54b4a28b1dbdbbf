"""Which splits of decode's rows are the same pages, so that one work item can read them for several rows at once.

Knows page tables and how rows are cut. A row's cut never depends on the others, so sharing changes who reads, and no result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leads", "start", "size", "rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SharedSplits:
    """Groups of rows that read the same split; S splits a row.

    Attributes:
        leads: whether the split is its row's to read: for a group's first row, and where there is no group.
        start: where the rows of a leading split's group stand in `rows`.
        size: how many they are; 1 without a group.
        rows: the rows of all groups.
    """

    leads: Bool[Array, "B S"]
    start: Int[Array, "B S"]
    size: Int[Array, "B S"]
    rows: Int[Array, " S*B"]


def share_splits(
    page_tables: Int[Array, "B P"],
    page_size: int,
    split_size: Int[Array, " B"],
    num_splits: Int[Array, " B"],
    *,
    max_splits: int,
    seats: int,
) -> SharedSplits:
    """Finds the groups. A row's last split is always its own: it holds the step's own token.

    Args:
        page_tables: pages of each row, in order.
        split_size: tokens of each split of a row but its last.
        num_splits: of each row.
        max_splits: S, the most that a row can have.
        seats: rows of a group at most.
    """
    num, width = page_tables.shape
    row, split = jnp.arange(num), jnp.arange(max_splits)
    in_reach = (split < num_splits[:, None] - 1) & (split_size % page_size == 0)[:, None]

    # 1. The first row with the same last page in this split and, as any pages may be in a table, with all pages the same.
    last = (split + 1) * split_size[:, None] // page_size - 1
    last = jnp.take_along_axis(page_tables, jnp.clip(last, 0, width - 1), axis=1)
    alike = (last[:, None] == last[None]) & (split_size[:, None] == split_size[None])[:, :, None]
    alike &= in_reach[:, None] & in_reach[None]
    first = jnp.min(jnp.where(alike, row[None, :, None], num), axis=1)
    split_of_column = jnp.minimum(jnp.arange(width) * page_size // split_size[:, None], max_splits - 1)
    other = jnp.minimum(jnp.take_along_axis(first, split_of_column, axis=1), num - 1)
    differs = page_tables != page_tables[other, jnp.arange(width)]
    differs = jnp.any(differs[:, :, None] & (split_of_column[:, :, None] == split), axis=1)
    first = jnp.where(in_reach & ~differs, first, num)

    # 2. Seats: a group of more rows than a tile has seats is several.
    together = (first[:, None] == first[None]) & (first < num)[:, None]
    rank = jnp.sum(together & (row[None] < row[:, None])[:, :, None], axis=1)
    total = jnp.sum(together, axis=1)
    leads = rank % seats == 0
    size = jnp.where(total > 0, jnp.minimum(seats, total - rank), 1)

    # 3. The rows of each split, group by group.
    place = jnp.sum(first[None] < first[:, None], axis=1) + rank
    is_at = (place[:, None] == row[None, :, None]) & (first < num)[:, None]
    rows = jnp.sum(jnp.where(is_at, row[:, None, None], 0), axis=0)
    return SharedSplits(leads, split * num + place, size, rows.T.reshape(-1).astype(jnp.int32))
