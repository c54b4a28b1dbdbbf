"""Compiles a model's whole budget of programs for devices that are not there, and says whether it fits. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxserve.build import Build
from jaxserve.compiling import Progress
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, DoesNotFitError
from jaxserve.models.loading import open_source
from jaxserve.pool_size import resident_bytes
from jaxserve.programs import ProgramReport
from jaxserve.sharding import make_mesh
from jaxserve.startup import compile_to_fit, plan_build
from jaxserve.tpu.target import Target

_ADVICE = (
    "Lower --gpu-memory-utilization (or what was given in its place: --num-gpu-blocks-override, --kv-cache-memory-bytes), "
    "--max-num-batched-tokens or --max-num-seqs, or raise --tensor-parallel-size."
)


@dataclass(frozen=True)
class TargetReport:
    """What came of compiling for a target.

    Attributes:
        reason: why it does not fit; None if it does. Where it does not, nothing of what follows is known.
        programs: what each took.
        kv_tokens: that the pool holds beside weights and programs.
        resident_bytes, pool_bytes, temporary_bytes: of a device: weights and states, the pool, and the most that a program
            needs besides while it runs.
    """

    reason: str | None = None
    programs: Sequence[ProgramReport] = ()
    kv_tokens: int = 0
    resident_bytes: int = 0
    pool_bytes: int = 0
    temporary_bytes: int = 0


def plan_for(config: EngineConfig, target: Target) -> Build:
    """What would be built on the target's first devices; all replicas are alike.

    Raises:
        DoesNotFitError: they have too little memory.
        ConfigError, ModelLoadError: the options or the model are wrong, whatever the target's memory.
    """
    parallel = config.parallel
    if parallel.tensor_parallel_size * parallel.data_parallel_size > len(target.devices):
        raise ConfigError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} times data_parallel_size={parallel.data_parallel_size} is more "
            f"than the {len(target.devices)} devices of --target {target.name}. Lower one of them, or name a larger target."
        )
    mesh = make_mesh(parallel.tensor_parallel_size, target.devices)
    return plan_build(config, open_source(config.model.model, config.model.load_format), mesh, target.memory)


def compile_for_target(config: EngineConfig, target: Target, *, on_progress: Progress | None = None) -> TargetReport:
    """Compiles every program that the engine would.

    Raises:
        ConfigError, ModelLoadError: as plan_for.
    """
    try:
        build, programs = compile_to_fit(plan_for(config, target), config, on_progress)
    except DoesNotFitError as e:
        return TargetReport(str(e))
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = " ".join(str(e).partition("\n\n")[0].split())
        return TargetReport(f"{said} {_ADVICE}")
    return TargetReport(
        programs=programs.reports,
        kv_tokens=build.num_pages * build.page_size if build.has_pages else 0,
        resident_bytes=resident_bytes(build),
        pool_bytes=build.num_pages * build.page_bytes,
        temporary_bytes=programs.temporary_bytes,
    )
