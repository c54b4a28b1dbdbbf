"""Compile targets, `tpu:v6e:2x2` or `gpu:h100:2`: devices that need not be there. Knows chips, but no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from jaxserve.absent_gpu import GIB, GPU_MEMORY, absent_gpus
from jaxserve.absent_tpu import quiet_libtpu
from jaxserve.errors import ConfigError

TPU_MEMORY: Mapping[str, int] = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.73 * GIB),
    "v6e": int(31.24 * GIB),
    "tpu7x": int(94.74 * GIB),
}
"""What libtpu leaves programs of a device's HBM. Devices as jax counts them: a tpu7x chip, of 192 GB, is two."""

_EXAMPLES = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        devices: jax's, which can be compiled for and nothing else.
        memory: bytes of each.
    """

    name: str
    devices: tuple[Any, ...]
    memory: int


def open_target(name: str) -> Target:
    """The devices of that name.

    Raises:
        ConfigError: there is no such target, or what compiles for it is not installed.
    """
    kind, *parts = name.split(":")
    if kind == "tpu" and len(parts) == 2 and parts[0] in TPU_MEMORY:
        return Target(name, _tpu_devices(name, *parts), TPU_MEMORY[parts[0]])
    if kind == "gpu" and len(parts) == 2 and parts[0] in GPU_MEMORY and parts[1].isdecimal() and int(parts[1]) > 0:
        return Target(name, _gpu_devices(name, parts[0], int(parts[1])), GPU_MEMORY[parts[0]])
    tpus = ", ".join(f"tpu:{chip}:{layout}" for chip, layout in _EXAMPLES.items())
    raise ConfigError(f"--target must be like {tpus}, gpu:h100:1 or gpu:h200:2; got {name!r}")


def _tpu_devices(name: str, chip: str, layout: str) -> tuple[Any, ...]:
    if find_spec("libtpu") is None:
        raise ConfigError(f"--target {name} needs libtpu, the TPU's compiler: pip install 'jaxserve[tpu]'")
    quiet_libtpu()
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{layout}").devices)
    except Exception as e:
        raise ConfigError(f"--target {name}: libtpu knows no such layout, unlike {_EXAMPLES[chip]} ({_first_line(e)})") from e


def _gpu_devices(name: str, gpu: str, count: int) -> tuple[Any, ...]:
    if find_spec("jax_cuda13_plugin") is None and find_spec("jax_cuda12_plugin") is None:
        raise ConfigError(f"--target {name} needs jax's CUDA packages: pip install 'jaxserve[cuda13]'")
    try:
        return absent_gpus(gpu, count)
    except Exception as e:
        raise ConfigError(f"--target {name}: jax's CUDA packages cannot compile for it ({_first_line(e)})") from e


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
