"""Top-k, top-p and min-p as one threshold a row, and the choice of a back end. Knows arrays only, neither requests nor noise.

Ties at a threshold are kept, as in vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged_attention import Implementation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cuts:
    """What each row keeps.

    Attributes:
        scale: [S], one over the temperature: what is compared is logits * scale.
        top_k: [S], a token is kept if fewer than so many are larger; 0 or less keeps all.
        top_p: [S], of those, the largest that make up this part of their probability, the one that reaches it included; 1 keeps all.
        min_p: [S], and at least this part of the largest one's probability; 0 keeps all.
    """

    scale: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]

    @property
    def log_min_p(self) -> Float[Array, " S"]:
        """How far below the largest logit a kept one may be."""
        return jnp.where(self.min_p > 0, jnp.log(self.min_p), -jnp.inf)


def order_of(x: Float[Array, ...]) -> Int[Array, ...]:
    """int32 that compare as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    order: Array = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    return order


def least_kept(logits: Float[Array, "S V"], cuts: Cuts, implementation: Implementation) -> Int[Array, " S"]:
    """The least order_of(logits * scale) that top-k, then top-p among those, and min-p keep."""
    if implementation == "mosaic_gpu":
        from jaxserve.pallas_kernels.kept_tokens import mosaic_gpu

        if mosaic_gpu.serves(logits.shape[1]):
            return mosaic_gpu.least_kept(logits, cuts)
    from jaxserve.pallas_kernels.kept_tokens import xla

    return xla.least_kept(logits, cuts)
