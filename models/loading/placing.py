"""Puts the parts of a parameter on their devices, turned over from the checkpoint's order of axes to ours. Knows no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from jaxserve.models.families.assembly import ALIGNMENT, Index, Shape, aligned, as_bits, memory_order

_ROWS = 128  # that are turned over at a time, so that a block stays in the cache
_PIECE = 2**18  # elements that are copied at a time where nothing is turned over
_BFLOAT16 = np.dtype(jnp.bfloat16)


def place_parts(shape: Shape, dtype: np.dtype, sharding: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array whose parts are read once each, and put on the devices that the sharding says."""
    read, parts, places = cache(read), [], sharding.addressable_devices_indices_map(shape)
    for device, index in places.items():
        assert index is not None  # None is for a device that holds no part of the array; each of ours does
        bounds: Index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        parts.append(place(read(bounds), device, dtype, is_shared=len(places) > 1))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def place(part: np.ndarray, device: jax.Device, dtype: np.dtype, *, is_shared: bool = False) -> jax.Array:
    """The part on the device, in `dtype`.

    An accelerator gets the bytes as they lie in the file and turns them over itself: a CPU core does less than 1 GB/s of that.

    Args:
        is_shared: other devices may get the same part.
    """
    if device.platform != "cpu":
        return turned_on_device(part, device, dtype)
    own = part if _is_ready(part, dtype) and not is_shared else turned_on_host(part, dtype)
    placed: jax.Array = jax.device_put(own, device)
    return placed


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
    out = aligned(part.shape, dtype)
    order = memory_order(part)
    _copy(part.transpose(order), out.transpose(order))
    return out


def _is_ready(part: np.ndarray, dtype: np.dtype) -> bool:
    """Whether JAX may have the memory itself: it is in order, and an assembly's own; what is mapped from a file is read-only."""
    is_own = part.flags.writeable and part.flags.c_contiguous
    return is_own and part.dtype == dtype and part.ctypes.data % ALIGNMENT == 0


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies an array that lies in one piece, by blocks of rows: some five times as fast as numpy's own way."""
    if source.flags.c_contiguous and target.flags.c_contiguous:
        source, target = source.reshape(-1), target.reshape(-1)
        for start in range(0, len(source), _PIECE):
            _cast(source[start : start + _PIECE], target[start : start + _PIECE])
    elif source.ndim > 2 and target.strides[0] > target.strides[1]:  # the outer axis of both, such as experts
        for inner, outer in zip(source, target, strict=True):
            _copy(inner, outer)
    else:
        for start in range(0, len(source), _ROWS):
            _cast(source[start : start + _ROWS], target[start : start + _ROWS])


def _cast(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source."""
    if source.dtype == target.dtype:
        as_bits(target)[...] = as_bits(source)
    elif source.dtype == _BFLOAT16 and target.dtype == np.float32:  # the upper half of a float32, and three times as fast so
        np.left_shift(source.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = source
