"""Build: a model on some devices, with all sizes: what start-up compiles and loads. The devices need not be there."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.buckets import Buckets, choose_buckets
from jaxserve.compiling import FindTracers, Progress, compile_programs
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.cache_layout import CacheLayout
from jaxserve.models.interface import Runtime, StateSpec
from jaxserve.models.loading import ModelDescription
from jaxserve.pool_size import local_bytes
from jaxserve.programs import ProgramInputs, Programs
from jaxserve.runner import abstract_state, page_bytes
from jaxserve.sharding import Shardings
from jaxserve.trace_cache import TraceCache
from jaxserve.tracing_processes import tracing_processes

SMALL_BYTES = 4e9  # of weights on each device: an H100 reads them in 1.4 ms, and a step takes the host 1 to 2
SMALL_STEPS = 4


@dataclass(frozen=True)
class Build:
    """What the steps of building share.

    Attributes:
        device_memory: bytes of one device, where it is not there to be asked.
    """

    config: EngineConfig
    model: ModelDescription
    runtime: Runtime
    shardings: Shardings
    dtype: jnp.dtype
    num_pages: int = 1  # until what else needs memory is known
    device_memory: int | None = None

    def on_mesh(self, mesh: Mesh | None) -> Build:
        """The same on other devices; with None, on none, so that it can be sent to another process."""
        shardings: Any = mesh and Shardings(mesh, self.runtime.attention)
        return replace(self, runtime=replace(self.runtime, mesh=mesh), shardings=shardings)

    @property
    def has_states(self) -> bool:
        """Whether some layer keeps a recurrent state."""
        return any(isinstance(spec, StateSpec) for spec in self.model.cache_specs)

    @property
    def has_pages(self) -> bool:
        """Whether some layer keeps something for each token."""
        return not all(isinstance(spec, StateSpec) for spec in self.model.cache_specs)

    @property
    def layout(self) -> CacheLayout:
        assert self.runtime.layout is not None
        return self.runtime.layout

    @property
    def page_size(self) -> int:
        """Tokens a page holds. Where pages hold nothing, a request has one, so that they bind nobody and cost no tables."""
        assert self.config.cache.block_size is not None and self.config.model.max_model_len is not None
        return self.config.cache.block_size if self.has_pages else self.config.model.max_model_len

    @property
    def kv_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float8_e4m3fn) if self.config.cache.kv_cache_dtype == "fp8" else self.dtype

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.layout.arrays, self.page_size, self.kv_dtype, self.shardings)

    @property
    def pages_per_slot(self) -> int:
        assert self.config.model.max_model_len is not None
        return -(-self.config.model.max_model_len // self.page_size)

    def buckets(self) -> Buckets:
        limits = self.config.scheduler
        assert limits.max_num_seqs is not None and limits.max_num_batched_tokens is not None
        sizes = limits.max_num_seqs, limits.max_num_batched_tokens, self.pages_per_slot, self.page_size
        return choose_buckets(self.runtime.platform, *sizes, self.layout.reaches, self.num_steps)

    @property
    def num_steps(self) -> int:
        """Decode steps that a program may run before the host is needed."""
        can_repeat = self.runtime.platform == "gpu" and self.runtime.has_one_device and not self.has_states
        if (asked := self.config.scheduler.num_scheduler_steps) is not None:
            if asked > 1 and not can_repeat:
                raise ConfigError(
                    f"num_scheduler_steps is {asked}, but several steps at a time are for one GPU and models without recurrent "
                    "states. Leave it out."
                )
            return asked
        is_small = can_repeat and self.runtime.attention == "mosaic_gpu" and sum(map(local_bytes, self.weights)) < SMALL_BYTES
        return SMALL_STEPS if is_small else 1

    @property
    def weights(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(
            jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=self.shardings.of(axes, w.shape))
            for w, axes in zip(self.model.abstract, self.model.logical_axes, strict=True)
        )

    def inputs(self) -> ProgramInputs:
        assert self.config.scheduler.max_num_seqs is not None
        slots = self.config.scheduler.max_num_seqs
        state = abstract_state(
            self.layout.arrays,
            self.num_pages,
            self.page_size,
            slots,
            self.pages_per_slot,
            self.dtype,
            self.shardings,
            kv_dtype=self.kv_dtype,
            num_tables=self.layout.num_tables,
            peer_sums=self.runtime.peer_sums,
        )
        return ProgramInputs(
            self.weights, state, slots, self.model.vocab_size, self.buckets(), self.shardings, self.layout.arrays
        )

    def compile(self, on_progress: Progress | None) -> Programs:
        # Programs for devices that are not there are compiled to see what each takes: not more at once than there are cores.
        cores = os.cpu_count() or 1
        threads = max(cores, 8) if self.device_memory is None else min(cores, 8)
        arguments = self.inputs(), self.model.apply, self.runtime, on_progress
        traces = self._traces()
        return compile_programs(*arguments, traces=traces, threads=threads, find_tracers=self._tracers(traces))

    def _tracers(self, traces: TraceCache | None) -> FindTracers | None:
        """Processes beside this one, where lowering kernels takes long and can be done for devices that are not at hand."""
        if traces is None or self.runtime.attention != "mosaic_gpu" or jax.process_count() > 1:
            return None
        return lambda programs, tracers: tracing_processes(self, tracers, traces.lacks(programs, self.runtime.platform))

    def _traces(self) -> TraceCache | None:
        folder, device = jax.config.jax_compilation_cache_dir, self.shardings.mesh.devices.flat[0]
        # On a CPU tracing is quick, and tracing for the cache takes longer: SmolLM2's first start 39 s against 33, the second alike.
        if self.runtime.platform == "cpu" or self.device_memory or not folder or find_spec("flatbuffers") is None:
            return None  # jax.export writes with flatbuffers
        maker = (self.model.spec, self.runtime, self.shardings.mesh.shape, device.device_kind, self.buckets())
        return TraceCache(Path(folder) / "traces", repr(maker))
