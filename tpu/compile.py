"""Compiles a model's whole budget of programs for devices that are not there, and says whether it fits. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, DoesNotFitError
from jaxserve.programs import ProgramReport, Progress
from jaxserve.sharding import make_mesh
from jaxserve.startup import compile_to_fit, plan_for
from jaxserve.tpu.target import Target


@dataclass(frozen=True)
class TargetReport:
    """What came of compiling for a target.

    Attributes:
        programs: empty where it does not fit.
        kv_tokens: that the pool holds beside weights and programs.
        reason: why it does not fit; None if it does.
        memory: bytes of a device.
    """

    programs: Sequence[ProgramReport]
    kv_tokens: int
    reason: str | None
    memory: int

    @property
    def fits(self) -> bool:
        return self.reason is None


def compile_for_target(config: EngineConfig, target: Target, *, on_progress: Progress | None = None) -> TargetReport:
    """Compiles every program that the engine would, on the target's first devices; all replicas are alike.

    Raises:
        ConfigError, ModelLoadError: the options or the model are wrong, whatever the target's memory.
    """
    parallel = config.parallel
    if parallel.tensor_parallel_size * parallel.data_parallel_size > len(target.devices):
        raise ConfigError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} times data_parallel_size={parallel.data_parallel_size} is more "
            f"than the {len(target.devices)} devices of --target {target.name}."
        )
    mesh = make_mesh(parallel.tensor_parallel_size, target.devices)
    try:
        build, programs = compile_to_fit(plan_for(config, mesh, target.memory), config, on_progress)
    except DoesNotFitError as e:
        return TargetReport((), 0, str(e), target.memory)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return TargetReport((), 0, " ".join(str(e).partition("\n\n")[0].split()), target.memory)
    return TargetReport(programs.reports, build.num_pages * build.page_size, None, target.memory)
