"""Rotary position embeddings: angles once a step for each RopeSpec, applied to the heads of every layer."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.models.spec import LinearScaling, Llama3Scaling, RopeSpec

Rotation = tuple[Array, Array]
"""cos and sin of every token's angles, each [T, rotary_dim / 2] in float32."""


def inverse_frequencies(spec: RopeSpec) -> np.ndarray:
    """Angle per position of each rotated pair, [rotary_dim / 2] in float64."""
    exponents = np.arange(0, spec.rotary_dim, 2) / spec.rotary_dim
    frequencies: np.ndarray = spec.theta**-exponents
    match spec.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case Llama3Scaling() as scaling:
            return _scale_llama3(frequencies, scaling)


def _scale_llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Llama 3.1's frequencies (https://arxiv.org/abs/2407.21783 trains with them; the formula is Meta's reference code)."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # of each pair over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    scaled: np.ndarray = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    return scaled


def rotation(spec: RopeSpec, positions: Int[Array, " T"]) -> Rotation:
    """cos and sin for each token, in float32: bfloat16 cannot tell late positions apart."""
    frequencies = jnp.asarray(inverse_frequencies(spec), jnp.float32)
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "T heads H"], by: Rotation) -> Float[Array, "T heads H"]:
    """Rotates the pairs (i, i + rotary_dim / 2) of each head; dimensions past rotary_dim stay as they are."""
    cos, sin = (part[:, None, :] for part in by)
    half = cos.shape[-1]
    first, second, rest = (part.astype(jnp.float32) for part in jnp.split(x, (half, 2 * half), axis=-1))
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1).astype(x.dtype)
