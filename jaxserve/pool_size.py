"""How many KV pages fit beside the weights, the states and what the programs need while they run.

From shapes and the compiler's report, never from free memory: the pool's size is part of every program's cache key.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax

from jaxserve.config import GIB, EngineConfig, xla_memory_fraction
from jaxserve.errors import ConfigError, DoesNotFitError
from jaxserve.pallas_kernels.collectives.peers import lent_bytes

if TYPE_CHECKING:
    from jaxserve.build import Build

log = logging.getLogger(__name__)

PAGES_MULTIPLE = 256  # the size must not follow every byte, as programs are compiled for it


def num_pages(build: Build, temporaries: int | None = None) -> int:
    """Pages that fit.

    Args:
        temporaries: bytes that the programs need while they run; None before they are compiled, for what they likely need.

    Raises:
        DoesNotFitError: not one fits.
        ConfigError: kv_cache_memory_bytes is too small, or has to be given.
    """
    cache = build.config.cache
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if not build.has_pages:
        assert build.config.scheduler.max_num_seqs is not None
        return build.config.scheduler.max_num_seqs
    if cache.kv_cache_memory_bytes is not None:
        states = state_bytes(build)
        if (pages := (cache.kv_cache_memory_bytes - states) // build.page_bytes) < 1:
            raise ConfigError(
                f"kv_cache_memory_bytes is {cache.kv_cache_memory_bytes:,}, of which the requests' recurrent states take {states:,} "
                f"and a page {build.page_bytes:,}. Raise it, or lower --max-num-seqs."
            )
        return pages
    if build.runtime.platform == "cpu":
        return max(GIB // build.page_bytes, 1)
    limit, usable = _memory(build)
    needed = (_likely_temporaries(build) if temporaries is None else temporaries) + resident_bytes(build)
    pages = int(usable - needed) // build.page_bytes // PAGES_MULTIPLE * PAGES_MULTIPLE
    if pages <= 0:
        raise DoesNotFitError(
            f"the weights and programs need {needed / GIB:.1f} GiB of {limit / GIB:.1f} GiB on each device, which leaves no "
            "KV pages. Raise --gpu-memory-utilization or --tensor-parallel-size, or lower --max-num-batched-tokens"
            + (" or --max-num-seqs (each request has a recurrent state)." if build.has_states else ".")
        )
    return pages


def _memory(build: Build) -> tuple[int, float]:
    """Bytes of a device, and those of them that may be filled."""
    share = build.config.cache.gpu_memory_utilization
    if build.device_memory is not None:
        return build.device_memory, build.device_memory * share
    limit: int = (build.shardings.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit", 0)
    if not limit:
        raise ConfigError("the device does not say how much memory it has; give --kv-cache-memory-bytes")
    if build.runtime.platform != "gpu":
        return limit, limit * share
    # The limit is what XLA may take, which is itself a share of the GPU's memory.
    return limit, min(limit, limit / xla_memory_fraction() * share)


def _likely_temporaries(build: Build) -> int:
    """Above what Llama's and Qwen's programs need; where a model needs more, its programs are compiled twice.

    Twice the widest activation of the longest step (gate and up, and their product), and some copies of the logits.
    """
    buckets, model, devices = build.buckets(), build.model, build.shardings.mesh.size
    widths = (math.prod(p.abstract.shape[1:]) for p in model.parameters if p.axes[0] == "embed")
    activations = buckets.tokens[-1] * max(widths, default=0) * build.dtype.itemsize // devices
    logits = buckets.samples[-1] * model.vocab_size * 4
    return 2 * activations + 4 * logits + 64 * 2**20


def resident_bytes(build: Build) -> int:
    """What stays on each device besides the pages: weights, recurrent states, what the sampler and the step keep, and what is lent."""
    inputs = build.inputs()
    results = [inputs.results(n) for n in inputs.buckets.samples]
    arrays = jax.tree.leaves((inputs.weights, inputs.shaping, results, inputs.packed, inputs.state.page_tables))
    lent = lent_bytes(build.shardings.mesh.size, inputs.logits_bytes) if build.runtime.peer_sums else 0
    return sum(map(local_bytes, arrays)) + state_bytes(build) + lent


def state_bytes(build: Build) -> int:
    """Bytes of all requests' recurrent states on each device."""
    inputs = build.inputs()
    caches: Any = zip(inputs.state.caches, inputs.is_state, strict=True)
    return sum(local_bytes(cache) for cache, is_state in caches if is_state)


def local_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Of an array, on each device."""
    assert array.sharding is not None
    return int(array.dtype.itemsize * math.prod(array.sharding.shard_shape(array.shape)))


def longest_request(build: Build) -> int:
    """Tokens of a request that fits the pool alone."""
    max_chunk = build.config.scheduler.max_num_batched_tokens
    assert max_chunk is not None and build.config.model.max_model_len is not None

    def pages_of(num_pages: int) -> int:
        """What it takes for a text of so many pages."""
        num_tokens = num_pages * build.page_size
        return sum(reach.max_pages(num_tokens, build.page_size, max_chunk) for reach in build.layout.reaches)

    at_most = max(build.num_pages, build.pages_per_slot)  # windows alone would hold a text without end
    return bisect_right(range(1, at_most + 1), build.num_pages, key=pages_of) * build.page_size


def tokens_held(build: Build) -> int:
    """Tokens that fit the pool in requests of the full length which decode: windows keep only the last ones of each."""
    length = build.pages_per_slot * build.page_size
    pages = sum(reach.max_pages(length, build.page_size, 1) for reach in build.layout.reaches)
    return build.num_pages * length // pages


def fit_model_len(build: Build, asked: int | None) -> EngineConfig:
    """A request of the full length must fit the pool alone, else it could never end."""
    model, holds = build.config.model, longest_request(build)
    assert model.max_model_len is not None
    if holds >= model.max_model_len:
        return build.config
    if asked is not None:
        raise DoesNotFitError(
            f"max_model_len is {asked:,} tokens, but the KV pool holds {holds:,}. Lower --max-model-len or give the pool more memory."
        )
    log.warning("max_model_len is %s: that is what the KV pool holds (the model itself could do %s)", holds, model.max_model_len)
    return replace(build.config, model=replace(model, max_model_len=holds))
