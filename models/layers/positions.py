"""Position embeddings that are computed, not learned."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoids(positions: Int[Array, " T"], dim: int) -> Float[Array, "T D"]:
    """Sines, then cosines, of wavelengths from 2 pi to 2 pi * 10,000, as fairseq orders them; a last odd dimension is 0."""
    half = dim // 2
    frequencies = np.exp(np.arange(half) * (-math.log(10_000) / (half - 1)))
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.pad(jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1), ((0, 0), (0, dim % 2)))
