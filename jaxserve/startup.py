"""Builds an engine from a config: opens the model, sizes the pool from the compiler's own report, compiles, loads.

Weights load while the programs compile.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve import uncollected
from jaxserve.absent_tpu import quiet_libtpu
from jaxserve.build import Build
from jaxserve.compile_cache import use_compile_cache
from jaxserve.compiling import Progress
from jaxserve.config import EngineConfig
from jaxserve.devices import expect_devices
from jaxserve.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.limits import Limits
from jaxserve.metrics import Observer
from jaxserve.model_defaults import default_sampling, eos_token_ids, load_tokenizer
from jaxserve.models.cache_layout import group_layers
from jaxserve.models.interface import Runtime
from jaxserve.models.loading import (
    ModelDescription,
    ModelSource,
    describe_model,
    load_weights,
    open_source,
    resolve_dtype,
)
from jaxserve.out_of_memory import explained_out_of_memory
from jaxserve.page_pool import PagePool
from jaxserve.pallas_kernels.collectives.peers import can_lend
from jaxserve.pallas_kernels.paged_attention import choose_implementation
from jaxserve.pool_size import fit_model_len, num_pages
from jaxserve.prefix_cache import PrefixCache
from jaxserve.programs import MODES, ProgramInputs, ProgramReport, Programs, whole_mode
from jaxserve.replicas import Replicas, share
from jaxserve.runner import Runner
from jaxserve.scheduler import Scheduler
from jaxserve.sharding import Shardings, kv_repeat, make_meshes
from jaxserve.summary import summary_of
from jaxserve.weight_store import WeightStore

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MakeRunner = Callable[[WeightStore, Programs, ProgramInputs], Runner]


@explained_out_of_memory()
def build_engine(
    config: EngineConfig,
    *,
    observer: Observer | None = None,
    on_progress: Progress | None = None,
    make_runner: MakeRunner | None = None,
) -> Engine | Replicas:
    """Loads the model, compiles every program and returns an engine that is ready.

    Raises:
        ConfigError: an option cannot work with this model or these devices.
        ModelLoadError: the model's files are missing, malformed or of an unknown architecture.
    """
    expect_devices()
    use_compile_cache(config.compile)
    with uncollected():  # transformers is imported
        source = open_source(config.model.model, config.model.load_format)
        tokenizer = load_tokenizer(config, source)
    meshes = make_meshes(config.parallel.tensor_parallel_size, config.parallel.data_parallel_size)
    engines = [
        _build_replica(
            plan_build(config, source, mesh),
            config,
            source,
            tokenizer,
            replica_observer,
            _of_replica(on_progress, i, len(meshes)),
            make_runner or Runner,
        )
        for i, (mesh, replica_observer) in enumerate(zip(meshes, share(observer, len(meshes)), strict=True))
    ]
    # What is loaded stays. Else each full collection walks it all, while hundreds of streams wait.
    gc.collect()
    gc.freeze()
    return engines[0] if len(engines) == 1 else Replicas(engines)


@explained_out_of_memory()
def compile_model(config: EngineConfig, *, on_progress: Progress | None = None) -> list[ProgramReport]:
    """Compiles every program that build_engine would, into the compile cache, without reading a weight.

    Raises:
        ConfigError, ModelLoadError: as build_engine.
    """
    quiet_libtpu()
    use_compile_cache(config.compile)
    source = open_source(config.model.model, config.model.load_format)
    meshes = make_meshes(config.parallel.tensor_parallel_size, config.parallel.data_parallel_size)
    reports: list[ProgramReport] = []
    for i, mesh in enumerate(meshes):
        build = plan_build(config, source, mesh)
        reports += compile_to_fit(build, config, _of_replica(on_progress, i, len(meshes)))[1].reports
    return reports


def plan_build(config: EngineConfig, source: ModelSource, mesh: Mesh, device_memory: int | None = None) -> Build:
    """What to build on a mesh, the number of pages included; with device_memory, the devices need not be there."""
    build = replace(_describe(config, source, mesh, is_there=device_memory is None), device_memory=device_memory)
    return _with_pages(build, num_pages(build), config)


def _with_pages(build: Build, pages: int, asked: EngineConfig) -> Build:
    build = replace(build, num_pages=pages)
    return replace(build, config=fit_model_len(build, asked=asked.model.max_model_len))


def compile_to_fit(build: Build, asked: EngineConfig, on_progress: Progress | None) -> tuple[Build, Programs]:
    """Compiles, and once more with fewer pages if the programs turn out to need more memory than the pool leaves them."""
    programs = build.compile(on_progress)
    pages = num_pages(build, programs.temporary_bytes)
    if pages >= build.num_pages:
        return build, programs
    log.warning("the programs leave room for %s KV pages, not %s: compiling them again", f"{pages:,}", f"{build.num_pages:,}")
    build = _with_pages(build, pages, asked)
    return build, build.compile(on_progress)


def _build_replica(
    build: Build,
    asked: EngineConfig,
    source: ModelSource,
    tokenizer: Tokenizer | None,
    observer: Observer | None,
    on_progress: Progress | None,
    make_runner: MakeRunner,
) -> Engine:
    seed, sharding_for = build.config.model.seed, build.shardings.of
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(load_weights, source, build.model, sharding_for=sharding_for, seed=seed, on_progress=on_progress)
        build, programs = compile_to_fit(build, asked, on_progress)
        weights = loading.result()
    inputs = build.inputs()
    store = WeightStore(build.model.paths, inputs.weights, weights)
    runner = make_runner(store, programs, inputs)
    if build.runtime.platform == "gpu" and jax.process_count() == 1:  # processes of a group would have to do so together
        runner.warm_up()
    return Engine(
        build.config,
        _scheduler(build),
        runner,
        tokenizer,
        vocab_size=build.model.vocab_size,
        weights=store,
        eos_token_ids=eos_token_ids(source, tokenizer),
        default_sampling=default_sampling(build.config, source),
        description=summary_of(build, len(programs)),
        observer=observer,
    )


def _of_replica(on_progress: Progress | None, index: int, count: int) -> Progress | None:
    """Reports each replica's stages under names of their own."""
    if on_progress is None or count == 1:
        return on_progress
    return lambda stage, done, total: on_progress(f"{stage} {index + 1}/{count}", done, total)


def _describe(config: EngineConfig, source: ModelSource, mesh: Mesh, *, is_there: bool) -> Build:
    platform = cast(Literal["cpu", "gpu", "tpu"], mesh.devices.flat[0].platform)
    dtype = jnp.dtype(resolve_dtype(config.model.dtype, platform, source))
    model = describe_model(
        source,
        dtype=dtype,
        kv_repeat=lambda heads: kv_repeat(heads, mesh.size),
        context=config.model.max_model_len,
        quantization=config.model.quantization,
        keep_quantized=True,
        outputs_first=platform == "cpu",
    )
    _check_quantization(config, source, model)
    resolved = config.resolve(platform, model.max_model_len)
    attention = choose_implementation(platform, mesh.devices.flat[0].device_kind)
    assert resolved.model.max_model_len is not None
    layout = group_layers(model.cache_specs, resolved.model.max_model_len)
    peer_sums = (
        config.compile.peer_sums and platform == "gpu" and mesh.size > 1 and (not is_there or can_lend(list(mesh.devices.flat)))
    )
    runtime = Runtime(platform, mesh, attention, layout, config.cache.share_page_reads, peer_sums)
    return Build(resolved, model, runtime, Shardings(mesh, attention), dtype)


def _check_quantization(config: EngineConfig, source: ModelSource, model: ModelDescription) -> None:
    """Says what a quantised checkpoint does not get as its maker meant it."""
    if source.quantization is None:
        return
    if source.quantization.has_kv_scales and config.cache.kv_cache_dtype == "fp8":
        raise ConfigError(
            "the checkpoint's kv_cache_scheme has scales for 8-bit keys and values, which are not supported. "
            "Leave out --kv-cache-dtype fp8: keys and values are then kept in the model's dtype, which needs none."
        )
    if not any(parameter.is_quantized for parameter in model.parameters):
        log.warning(
            "the checkpoint's quantised weights are dequantised while they load: they have a scale for each block, or are not "
            "meant to be multiplied in 8 bits; --quantization fp8 rounds them again, with a scale for each channel"
        )


def _scheduler(build: Build) -> Scheduler:
    buckets = build.buckets()
    limits = Limits(
        max_num_seqs=buckets.max_num_seqs,
        max_num_batched_tokens=buckets.tokens[-1],
        max_page_updates=buckets.max_page_updates,
        token_sizes=buckets.tokens,
        num_steps=buckets.num_steps,
        repeated_rows=max(buckets.repeated_shapes, default=0),
        repeated_mode_rank=MODES.index(whole_mode(build.runtime)),
        align=buckets.align,
    )
    pool = PagePool(build.num_pages)
    # A page alone cannot be gone on from where layers also keep a state.
    caches = build.config.cache.enable_prefix_caching and not build.has_states
    cache = PrefixCache(pool, build.layout.num_tables) if caches else None
    return Scheduler(limits, pool, build.page_size, cache, build.layout.reaches)
