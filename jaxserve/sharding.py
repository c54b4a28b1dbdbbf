"""The mesh, and which logical axis of a parameter lies on it. Sharding objects are built once, never in a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from jaxserve.errors import ConfigError
from jaxserve.models.interface import MODEL_AXIS, LogicalAxes, pages_partition
from jaxserve.pallas_kernels.paged_attention import Implementation

ON_MODEL_AXIS = frozenset({"vocab", "heads", "kv_heads", "ffn", "experts"})
"""Logical axes that tensor (and expert) parallelism cuts, where they divide; the others are whole on every device."""


def make_mesh(tensor_parallel_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over the first devices.

    Raises:
        ConfigError: there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        there = "is 1 device" if len(devices) == 1 else f"are {len(devices)} devices"
        raise ConfigError(f"tensor_parallel_size is {tensor_parallel_size}, but there {there}. Lower it, or add devices.")
    return Mesh(np.array(devices[:tensor_parallel_size]), (MODEL_AXIS,))


def make_meshes(tensor_parallel_size: int, data_parallel_size: int) -> list[Mesh]:
    """A mesh for each replica, on devices of its own.

    Raises:
        ConfigError: there are fewer devices.
    """
    devices = _of_every_process(jax.devices(), tensor_parallel_size)
    if data_parallel_size > 1 and len(devices) < tensor_parallel_size * data_parallel_size:
        raise ConfigError(
            f"data_parallel_size={data_parallel_size} times tensor_parallel_size={tensor_parallel_size} is more than the "
            f"{len(devices)} devices there are. Lower one of them, or add devices."
        )
    starts = range(0, tensor_parallel_size * data_parallel_size, tensor_parallel_size)
    return [make_mesh(tensor_parallel_size, devices[start : start + tensor_parallel_size]) for start in starts]


def _of_every_process(devices: Sequence[jax.Device], wanted: int) -> list[jax.Device]:
    """The first devices of each process, as many of each: a process without a device of the mesh could not take part."""
    processes = jax.process_count()
    if wanted % processes:
        raise ConfigError(
            f"tensor_parallel_size={wanted} does not spread evenly over the {processes} processes of the group. "
            f"Choose a multiple of {processes}."
        )
    if processes == 1:
        return list(devices)
    own = [[device for device in devices if device.process_index == process] for process in range(processes)]
    return [device for each in own for device in each[: wanted // processes]]


class Shardings:
    """Every sharding that the engine uses on one mesh.

    Attributes:
        attention: the kernel that lays the pages out.
    """

    def __init__(self, mesh: Mesh, attention: Implementation = "xla") -> None:
        self.mesh = mesh
        self.replicated = NamedSharding(mesh, P())
        self.by_device = NamedSharding(mesh, P(MODEL_AXIS))
        self.attention = attention
        self.kv_pages = NamedSharding(mesh, pages_partition(attention))

    def of(self, axes: LogicalAxes, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of a parameter; an axis that does not divide by the devices is whole on each of them."""
        size = self.mesh.shape[MODEL_AXIS]
        parts = (MODEL_AXIS if a in ON_MODEL_AXIS and n % size == 0 else None for a, n in zip(axes, shape, strict=True))
        return NamedSharding(self.mesh, P(*parts))

    @cached_property
    def _own_devices(self) -> list[jax.Device]:
        return list(self.replicated.addressable_devices)

    def replicate(self, array: NDArray[Any] | np.integer[Any]) -> jax.Array:
        """The array, from the host, on every device."""
        if self.replicated.is_fully_addressable:
            sent: jax.Array = jax.device_put(array, self.replicated)
            return sent
        # Across processes device_put would first ask each of them whether it has the same.
        parts = jax.device_put([array] * len(self._own_devices), self._own_devices)
        return jax.make_array_from_single_device_arrays(array.shape, self.replicated, parts)


def kv_repeat(num_kv_heads: int, tensor_parallel_size: int) -> int:
    """How often each kv head is repeated so that every device has one.

    Raises:
        ConfigError: the heads can neither be cut nor repeated evenly.
    """
    if num_kv_heads % tensor_parallel_size == 0:
        return 1
    if tensor_parallel_size % num_kv_heads == 0:
        return tensor_parallel_size // num_kv_heads
    raise ConfigError(
        f"the model's {num_kv_heads} kv heads do not spread evenly over tensor_parallel_size={tensor_parallel_size}. "
        f"Choose a divisor or a multiple of {num_kv_heads}."
    )
