"""Compile targets, `tpu:v6e:2x2` or `gpu:h100:2`: devices that need not be there. Knows chips, but no model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from jaxserve.absent_tpu import quiet_libtpu
from jaxserve.errors import ConfigError

GB = 10**9
GIB = 1024**3

TPU_MEMORY: Mapping[str, int] = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.73 * GIB),
    "v6e": int(31.24 * GIB),
    "tpu7x": int(94.74 * GIB),
}
"""What libtpu leaves programs of a device's HBM. Devices as jax counts them: a tpu7x chip, of 192 GB, is two."""

_EXAMPLES = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}

_H100 = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  driver_version: "13.0.0"
  kernel_mode_driver_version: "580.65.6"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.28.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""  # without the versions, XLA takes the driver for too old to record its kernels as one graph; without NVLinks, it has NCCL's all-reduce alone

_GPUS: Mapping[str, dict[str, Any]] = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * GIB, "bandwidth": 3352 * GB},
    "h200": {"name": "NVIDIA H200", "memory": 141 * GB, "bandwidth": 4800 * GB},
}


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
    if kind == "gpu" and len(parts) == 2 and parts[0] in _GPUS and parts[1].isdecimal() and int(parts[1]) > 0:
        return Target(name, _gpu_devices(name, parts[0], int(parts[1])), _GPUS[parts[0]]["memory"])
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
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there need be no driver
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_H100.format(**_GPUS[gpu]), topology=f"1x1x{count}"
        )
    except Exception as e:
        raise ConfigError(f"--target {name}: jax's CUDA packages cannot compile for it ({_first_line(e)})") from e
    return tuple(description.devices)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
