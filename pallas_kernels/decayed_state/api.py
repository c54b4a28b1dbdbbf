"""A decode step of h = exp(decay) h + v k, y = h q: the signature, and which shapes the kernel serves. Knows arrays only.

XLA gathers the states, computes new ones and scatters these, which moves each twice; they are most of what a step moves.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float, Int


def serves(pool: jax.Array) -> bool:
    """Whether the kernel takes a pool [slots, heads, P, N]."""
    dim, size = pool.shape[2:]
    return pool.size < 2**31 and size <= 1024 and all(n & (n - 1) == 0 and n >= 16 for n in (dim, size))


def advance(
    pool: Float[Array, "slots heads P N"],
    q: Float[Array, "B groups N"],
    k: Float[Array, "B groups N"],
    v: Float[Array, "B heads P"],
    decay: Float[Array, "B heads"],
    slots: Int[Array, " B"],
    starts: Bool[Array, " B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "slots heads P N"], Float[Array, "B heads P"]]:
    """The pool with the new states, in place when it is donated, and y.

    Args:
        q, k: shared by the heads of a group.
        decay: the logarithm of the factor.
        slots: where each row's state is; past the pool for a row not in use, whose y is unspecified.
        starts: rows whose state is empty (zeros) before this token.
        interpret: in Pallas' interpreter.
    """
    from jaxserve.pallas_kernels.decayed_state import triton

    return triton.advance(pool, q, k, v, decay, slots, starts, interpret)
