"""What a layer keeps, as data: pages of so much for each token, or a state for each request. Knows no arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jax.typing import DTypeLike

from jaxserve.pallas_kernels import paged_attention as kernels

CacheKind = Literal["full", "sliding", "chunked", "latent"]


@dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps for each token.

    Attributes:
        kind: keys and values of all tokens; of a sliding window (further back is never read); of the token's own chunk; or
            one latent row that is key and value of all heads.
        num_kv_heads, head_dim: of keys and values; a latent row is one head's.
        window: keys that a token sees, itself included; the chunk's length; None for all.
    """

    kind: CacheKind
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether heads spread over devices; otherwise each device holds all of it."""
        return self.kind != "latent"

    def page_values(self, page_size: int, implementation: kernels.Implementation) -> int:
        """Numbers that a page holds."""
        return math.prod(self.pages_shape(1, page_size, implementation))

    def pages_shape(self, num_pages: int, page_size: int, implementation: kernels.Implementation) -> tuple[int, int, int, int]:
        """Shape of the layer's pool, as the attention kernel lays it out."""
        is_latent = self.kind == "latent"
        heads = 1 if is_latent else self.num_kv_heads
        return kernels.pages_shape(num_pages, page_size, heads, self.head_dim, implementation, is_latent=is_latent)


@dataclass(frozen=True)
class StateSpec:
    """What one layer keeps for each request, however long its text: a state that every token changes.

    Attributes:
        shape: of one request's state.
        axes: logical axes of its dimensions.
        dtype: None for the model's. A state that sums over a whole text wants float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: DTypeLike | None = None


AnyCacheSpec = CacheSpec | StateSpec
