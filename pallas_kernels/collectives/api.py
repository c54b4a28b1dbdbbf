"""Collectives under shard_map: their signatures, and the choice between kernels and XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

Peers = Int32[Array, "1 entries 2"]
"""This device's row of the table that peers.lend gives, with which GPUs send by writing into each other's memory."""


def all_reduce(x: Float[Array, ...], peers: Peers | None, axis: str) -> Float[Array, ...]:
    """The sum over a mesh axis, the same on all its devices. XLA's where the kernel does not serve x: more than some MB."""
    if peers is not None:
        from jaxserve.pallas_kernels.collectives import mosaic_gpu_all_reduce as kernel

        if kernel.can_sum(x, peers.shape[1] - 1):
            by_kernel: jax.Array = kernel.all_reduce(x, peers)
            return by_kernel
    summed: jax.Array = jax.lax.psum(x, axis)
    return summed


def all_reduce_normed(
    parts: Float[Array, "S T D"],
    residual: Float[Array, "T D"],
    gain: Float[Array, " D"],
    peers: Peers | None,
    axis: str,
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """residual plus the sum of parts over a mesh axis, and the RMS norm of that times (gain + offset), in float32.

    Args:
        parts: of this device, whose sum in float32 is rounded to residual's type before it is sent.
    """
    if peers is not None and gain.dtype == residual.dtype:
        from jaxserve.pallas_kernels.collectives import mosaic_gpu_all_reduce_norm as kernel

        if kernel.can_norm(parts, residual, peers.shape[1] - 1):
            by_kernel: tuple[Array, Array] = kernel.all_reduce_normed(parts, residual, gain, peers, eps=eps, offset=offset)
            return by_kernel
    total = residual + all_reduce(add_up(parts, residual.dtype), peers, axis)
    wide = total.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return total, (normed * (gain.astype(jnp.float32) + offset)).astype(residual.dtype)


def add_up(parts: Float[Array, "S T D"], dtype: DTypeLike) -> Float[Array, "T D"]:
    """The sum of a device's parts, in float32, rounded to the type."""
    return parts.astype(jnp.float32).sum(0).astype(dtype)


def all_gather(x: Float[Array, "S P"], peers: Peers | None, axis: str) -> Float[Array, "S V"]:
    """The columns that the devices of a mesh axis have, side by side; at most as much as was lent for it."""
    if peers is not None:
        from jaxserve.pallas_kernels.collectives import mosaic_gpu_all_gather as kernel

        if kernel.can_gather(x, peers.shape[1] - 1):
            by_kernel: jax.Array = kernel.all_gather(x, peers)
            return by_kernel
    gathered: jax.Array = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    return gathered
