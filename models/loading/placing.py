"""Puts the parts of a parameter on their devices, turned over from the checkpoint's order of axes to ours. Knows no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from jaxserve.models.families.assembly import Index, Shape, memory_order

_ROWS = 128  # that are turned over at a time, so that a block stays in the cache
_ALIGNMENT = 64  # bytes; what JAX takes on a CPU as it is, without a copy
_BFLOAT16 = np.dtype(jnp.bfloat16)


def place_parts(shape: Shape, dtype: np.dtype, sharding: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array whose parts are read once each, and put on the devices that the sharding says."""
    read, parts = cache(read), []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # None is for a device that holds no part of the array; each of ours does
        bounds: Index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        parts.append(place(read(bounds), device, dtype))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def place(part: np.ndarray, device: jax.Device, dtype: np.dtype) -> jax.Array:
    """The part on the device, in `dtype`.

    An accelerator gets the bytes as they lie in the file and turns them over itself: a CPU core does less than 1 GB/s of that.
    """
    if device.platform == "cpu":
        placed: jax.Array = jax.device_put(turned_on_host(part, dtype), device)
        return placed
    return turned_on_device(part, device, dtype)


def turned_on_device(part: np.ndarray, device: jax.Device, dtype: np.dtype) -> jax.Array:
    """The part, turned over on the device that it is for."""
    order = memory_order(part)
    stored: jax.Array = jax.device_put(np.asarray(part.transpose(order), order="C"), device)
    if part.dtype == dtype and order == tuple(range(part.ndim)):
        return stored
    turned: jax.Array = _turner(tuple(np.argsort(order).tolist()), dtype)(stored)
    return turned


@cache
def _turner(order: tuple[int, ...], dtype: np.dtype) -> jax.stages.Wrapped:
    """The program that turns parts over; layers are alike, so it is compiled for few shapes."""

    def turn(stored: Array) -> Array:
        return stored.transpose(order).astype(dtype)

    return jax.jit(turn)


def turned_on_host(part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of the part in memory of its own, in the order of its axes."""
    out = _aligned(part.shape, dtype)
    order = memory_order(part)
    _copy(part.transpose(order), out.transpose(order))
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies an array that lies in one piece, by blocks of rows: some five times as fast as numpy's own way."""
    if source.ndim > 2 and target.strides[0] > target.strides[1]:  # the outer axis of both, such as experts
        for inner, outer in zip(source, target, strict=True):
            _copy(inner, outer)
    elif source.ndim == 0:
        target[...] = source
    else:
        for start in range(0, len(source), _ROWS):
            _cast(source[start : start + _ROWS], target[start : start + _ROWS])


def _cast(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, in types that numpy knows itself: with those it lets other threads run."""
    if source.dtype == target.dtype:
        bits = f"u{source.itemsize}"
        target.view(bits)[...] = source.view(bits)
    elif source.dtype == _BFLOAT16 and target.dtype == np.float32:  # the upper half of a float32, and three times as fast so
        np.left_shift(source.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = source
