"""GPUs that are not there: to compile for them, or to trace for those that another process has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

GB = 10**9
GIB = 1024**3

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

GPU_MEMORY: Mapping[str, int] = {gpu: what["memory"] for gpu, what in _GPUS.items()}
"""Bytes of each GPU that is known."""


def absent_gpus(gpu: str, count: int) -> tuple[Any, ...]:
    """Devices that jax can compile for and nothing else, one of GPU_MEMORY; raises what jax does without its CUDA packages."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there need be no driver
    from jax.experimental import topologies

    config = _H100.format(**_GPUS[gpu])
    return tuple(topologies.get_topology_desc("", "cuda", target_config=config, topology=f"1x1x{count}").devices)
