"""Rotary position embeddings: angles once a step for each RopeSpec, applied to the heads of every layer."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.models.spec import FactorScaling, LinearScaling, Llama3Scaling, RopeSpec, YarnScaling

Rotation = tuple[Array, Array]
"""cos and sin of every token's angles, each [T, rotary_dim / 2] in float32."""


def inverse_frequencies(spec: RopeSpec) -> np.ndarray:
    """Angle per position of each rotated pair, [rotary_dim / 2] in float64."""
    exponents = np.arange(0, spec.rotary_dim, 2) / (spec.frequency_dim or spec.rotary_dim)
    frequencies: np.ndarray = spec.theta**-exponents
    match spec.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case FactorScaling(factors=factors):
            frequencies /= np.asarray(factors)
            return frequencies
        case Llama3Scaling() as scaling:
            return _scale_llama3(frequencies, scaling)
        case YarnScaling() as yarn:
            return _scale_yarn(frequencies, spec, yarn)


def _scale_llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Llama 3.1's frequencies (https://arxiv.org/abs/2407.21783 trains with them; the formula is Meta's reference code)."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # of each pair over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    scaled: np.ndarray = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    return scaled


def _scale_yarn(frequencies: np.ndarray, spec: RopeSpec, scaling: YarnScaling) -> np.ndarray:
    """YaRN's blend by parts, https://arxiv.org/abs/2309.00071, section 3.2."""
    dim = spec.rotary_dim

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position / (times * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolate = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    scaled: np.ndarray = interpolate * frequencies / scaling.factor + (1 - interpolate) * frequencies
    return scaled


def rotation(spec: RopeSpec, positions: Int[Array, " T"]) -> Rotation:
    """cos and sin for each token, in float32: bfloat16 cannot tell late positions apart."""
    frequencies = jnp.asarray(inverse_frequencies(spec), jnp.float32)
    angles = positions[:, None].astype(jnp.float32) * frequencies
    factor = getattr(spec.scaling, "attention_factor", 1.0)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x: Float[Array, "T heads H"], by: Rotation, interleaved: bool = False) -> Float[Array, "T heads H"]:
    """Rotates the pairs (i, i + rotary_dim / 2) of each head, or (2 i, 2 i + 1); dimensions past rotary_dim stay as they are."""
    cos, sin = (part[:, None, :] for part in by)
    half = cos.shape[-1]
    if interleaved:
        turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :].astype(jnp.float32)
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack((first * cos - second * sin, second * cos + first * sin), axis=-1).reshape(turned.shape)
        return jnp.concatenate((turned, rest), axis=-1).astype(x.dtype)
    if x.shape[-1] == 2 * half:  # without concatenation, which XLA makes a slow GPU kernel of
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, half)
        turned = pairs * cos[..., None, :] + jnp.flip(pairs, -2) * jnp.stack((-sin, sin), axis=-2)
        return turned.reshape(x.shape).astype(x.dtype)
    first, second, rest = (part.astype(jnp.float32) for part in jnp.split(x, (half, 2 * half), axis=-1))
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1).astype(x.dtype)
