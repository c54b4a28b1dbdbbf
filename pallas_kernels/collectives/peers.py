"""Memory that the devices of a mesh lend to each other, and the table that tells kernels where it lies."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32


def lend(mesh: Mesh, gathered_bytes: int = 0) -> tuple[list[jax.Array], Int32[Array, "devices entries 2"]]:
    """Takes memory on each device of a mesh of one axis, in one process.

    Args:
        gathered_bytes: the largest result of an all_gather.

    Returns:
        That memory, zeros at first, which kernels write behind XLA's back: to be kept as long as programs run that were given
        the table. And the table: row i, which is on device i, has i and the address of each one's memory, as two words each.
    """
    devices = mesh.size
    words = math.ceil(lent_bytes(devices, gathered_bytes) / 4)
    lent = [jnp.zeros(words, jnp.int32, device=device) for device in mesh.devices.flat]
    addresses = [memory.block_until_ready().unsafe_buffer_pointer() for memory in lent]
    rows = np.array([[rank, *addresses] for rank in range(devices)], np.int64)
    table = rows.view(np.int32).reshape(devices, devices + 1, 2)
    return lent, jax.device_put(table, NamedSharding(mesh, P(*mesh.axis_names)))


def lent_bytes(devices: int, gathered_bytes: int) -> int:
    """What `lend` takes on each device."""
    from jaxserve.pallas_kernels.collectives.mosaic_gpu_all_reduce import slots_end

    return slots_end(devices) + gathered_bytes // devices * (devices - 1)


def can_lend(devices: Sequence[jax.Device]) -> bool:
    """Whether these are GPUs of this process that reach each other's memory, as the driver says."""
    if any(device.platform != "gpu" or device.process_index != jax.process_index() for device in devices):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    reaches = ctypes.c_int(0)
    ordinals = [device.local_hardware_id for device in devices]
    return all(
        driver.cuDeviceCanAccessPeer(ctypes.byref(reaches), a, b) == 0 and reaches.value == 1
        for a, b in itertools.permutations(ordinals, 2)
    )
