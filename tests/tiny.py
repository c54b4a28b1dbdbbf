"""A tiny random model with a real engine around it, and the oracle: the same model without pages, recomputed in full."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.buckets import Buckets, choose_buckets
from jaxserve.compiling import compile_programs
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.limits import Limits
from jaxserve.models.cache_layout import CacheLayout, group_layers
from jaxserve.models.decoder import abstract_decoder
from jaxserve.models.description import describe_decoder
from jaxserve.models.interface import Runtime, StateSpec, StepBatch
from jaxserve.models.recurrent_spec import MambaSpec
from jaxserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec, RopeSpec
from jaxserve.outputs import RequestOutput
from jaxserve.page_pool import PagePool
from jaxserve.prefix_cache import PrefixCache
from jaxserve.programs import MODES, ProgramInputs, Programs, whole_mode
from jaxserve.runner import Runner, abstract_state
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.sharding import Shardings, make_mesh
from jaxserve.weight_store import WeightStore
from tests.older_emitters import older_emitters

VOCAB = 96
CHUNK = 40  # positions, of the hybrid's chunked layer


def tiny_spec(
    window: int | None = None, recurrent: bool = False, all_windowed: bool = False, hybrid: bool = False
) -> DecoderSpec:
    """Two layers of attention, the second with a window, or both; recurrent: one between two that keep a state.

    hybrid: three layers with the window, one that sees everything and one that sees chunks.
    """
    mixer = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=RopeSpec(theta=1e4, rotary_dim=16))
    layers = [LayerSpec(mixer=mixer, mlp=MlpSpec(dim=48, activation="silu"))]
    layers.append(LayerSpec(mixer=AttentionSpec(**(vars(mixer) | {"window": window})), mlp=layers[0].mlp))
    if all_windowed:
        layers[0] = layers[1]
    if hybrid:
        chunked = LayerSpec(mixer=AttentionSpec(**(vars(mixer) | {"chunk": CHUNK})), mlp=layers[0].mlp)
        layers = [layers[1], layers[0], layers[1], chunked, layers[1]]
    if recurrent:
        state = MambaSpec(dim=48, state_dim=4, dt_rank=3, conv_kernel=4, activation="silu")
        layers = [LayerSpec(mixer=state, mlp=None), layers[0], LayerSpec(mixer=state, mlp=layers[0].mlp)]
    return DecoderSpec(vocab_size=VOCAB, d_model=32, layers=tuple(layers), norm=NormSpec(eps=1e-5), max_position=512)


@cache
def tiny_weights(spec: DecoderSpec) -> tuple[Any, tuple[jax.Array, ...]]:
    """(apply, weights): spread wide enough that tokens differ."""
    graphdef, state = nnx.split(abstract_decoder(spec, jnp.float32))
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    weights = tuple(
        jnp.asarray(rng.standard_normal(x.shape) * (1.5 / x.shape[0] ** 0.5) if len(x.shape) > 1 else np.ones(x.shape), x.dtype)
        for x in leaves
    )

    def apply(weights: Any, batch: StepBatch, caches: Any, runtime: Any) -> Any:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))(batch, caches, runtime)

    return apply, weights


@cache
def tiny_names(spec: DecoderSpec) -> list[str]:
    """Of the weights, in their order."""
    return [parameter.path for parameter in describe_decoder("tiny", spec, jnp.float32).parameters]


MAX_MODEL_LEN = 256
NUM_SLOTS = 8
NUM_TOKENS = 64
NUM_PAGES = 64


@dataclass(frozen=True)
class TinyOptions:
    """The first eight need programs of their own; the others are the host's own business."""

    platform: Literal["cpu", "gpu"] = "cpu"  # whose list of programs is compiled, for the CPU
    num_steps: int = 1
    page_size: int = 16
    window: int | None = None
    recurrent: bool = False
    all_windowed: bool = False
    hybrid: bool = False
    num_slots: int = NUM_SLOTS
    num_pages: int = NUM_PAGES
    max_num_seqs: int = 4
    max_num_batched_tokens: int = NUM_TOKENS
    prefix_caching: bool = True
    seed: int = 0
    scheduling_policy: str = "fcfs"
    align: int = 1


@cache
def _programs(
    page_size: int,
    window: int | None,
    recurrent: bool,
    all_windowed: bool,
    hybrid: bool,
    slots: int,
    platform: Literal["cpu", "gpu"] = "cpu",
    num_steps: int = 1,
) -> tuple[Buckets, ProgramInputs, Programs, CacheLayout, Any]:
    spec = tiny_spec(window, recurrent, all_windowed, hybrid)
    apply, weights = tiny_weights(spec)
    mesh = make_mesh(1)
    shardings = Shardings(mesh)
    pages_per_slot = MAX_MODEL_LEN // page_size
    layout = group_layers(abstract_decoder(spec, jnp.float32).cache_specs(), MAX_MODEL_LEN, max_tables=4)
    buckets = choose_buckets(platform, slots, max(NUM_TOKENS, 2 * slots), pages_per_slot, page_size, layout.reaches, num_steps)
    sizes = NUM_PAGES * layout.num_tables * slots // NUM_SLOTS, page_size, slots, pages_per_slot
    state = abstract_state(layout.arrays, *sizes, jnp.dtype("float32"), shardings, num_tables=layout.num_tables)
    placed = tuple(jax.device_put(w, shardings.replicated) for w in weights)
    abstract = tuple(jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=shardings.replicated) for w in weights)
    inputs = ProgramInputs(abstract, state, slots, VOCAB, buckets, shardings, layout.arrays)
    runtime = Runtime(platform, mesh, layout=layout)
    # What they make computes prefills more slowly, and tests of the hybrid have many.
    with nullcontext() if hybrid else older_emitters():
        return buckets, inputs, compile_programs(inputs, apply, runtime, threads=2), layout, placed


def tiny_engine(tokenizer: Any = None, observer: Any = None, **changes: Any) -> Engine:
    """An engine; equal options share their compiled programs."""
    options = TinyOptions(**changes)
    model = options.window, options.recurrent, options.all_windowed, options.hybrid
    buckets, inputs, programs, layout, weights = _programs(
        options.page_size, *model, options.num_slots, options.platform, options.num_steps
    )
    spec = tiny_spec(*model)
    pool = PagePool(options.num_pages)
    updates = buckets.max_page_updates
    sizes = tuple(n for n in buckets.tokens if n <= options.max_num_batched_tokens)
    limits = Limits(
        options.max_num_seqs,
        options.max_num_batched_tokens,
        updates,
        token_sizes=sizes,
        num_steps=options.num_steps,
        repeated_rows=max(buckets.repeated_shapes, default=0),
        repeated_mode_rank=MODES.index(whole_mode(Runtime(options.platform))),
        align=options.align,
    )
    inputs = replace(inputs, buckets=replace(buckets, align=options.align))
    cache = PrefixCache(pool, layout.num_tables) if options.prefix_caching and not options.recurrent else None
    scheduler = Scheduler(limits, pool, options.page_size, cache, layout.reaches)
    config = EngineConfig.from_options(
        model="tiny", max_model_len=MAX_MODEL_LEN, seed=options.seed, scheduling_policy=options.scheduling_policy
    )
    store = WeightStore(tiny_names(spec), inputs.weights, weights)
    return Engine(
        config, scheduler, Runner(store, programs, inputs), tokenizer, vocab_size=VOCAB, weights=store, observer=observer
    )


def with_limits(engine: Engine, **options: Any) -> Engine:
    """The engine, with options of SchedulerConfig that nothing is compiled for."""
    engine.config = replace(engine.config, scheduler=replace(engine.config.scheduler, **options))
    return engine


def check_integrity(engine: Engine) -> None:
    """The host's books balance, and the device has the page tables that the host thinks it has."""
    engine.check_integrity()
    assert isinstance(engine.runner, Runner)
    tables = np.asarray(engine.runner._state.page_tables)
    slots = tables.shape[0] // len(engine.scheduler.pages.find(()).columns)
    for request in engine.scheduler.running:
        for number, column in enumerate(request.table.columns):
            there = tables[number * slots + request.slot, column.num_passed : column.num_sent].tolist()
            assert there == column.pages[column.num_passed : column.num_sent], f"table {number} of {request.group.request_id}"


def run(engine: Engine, limit: int = 2000) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the books must balance after every step."""
    finished = {}
    for _ in range(limit):
        if not engine.has_work:
            assert engine.scheduler.pool.num_held == 0, "pages are held by nobody"
            return finished
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        check_integrity(engine)
    raise AssertionError(f"requests are unfinished after {limit} steps")


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, output_kind=OutputKind.FINAL_ONLY, **changes)


class DenseRuntime(Runtime):
    """Dense causal attention over the batch's own tokens, no pages."""

    def attend(  # type: ignore[override]
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: jax.Array,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None,
        chunk: int | None,
        **others: None,
    ) -> tuple[jax.Array, jax.Array]:
        assert not any(others.values()), "tiny models have none of these"
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        logits = jnp.einsum("TNH,SNH->NTS", q, k) * scale
        t = jnp.arange(q.shape[0])
        seen = t[None] <= t[:, None]
        if window is not None:
            seen &= t[None] > t[:, None] - window
        if chunk is not None:
            seen &= t[None] // chunk == t[:, None] // chunk
        return jnp.einsum("NTS,SNH->TNH", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1), v), cache


@cache
def _dense(spec: DecoderSpec) -> Any:
    apply, weights = tiny_weights(spec)

    @jax.jit
    def logits(token_ids: jax.Array) -> jax.Array:
        n = token_ids.shape[0]
        zero, length = jnp.zeros(1, jnp.int32), jnp.full(1, n)
        start = jnp.concatenate([zero, length])
        batch = StepBatch(token_ids, jnp.arange(n), start, length, zero[None], token_ids, zero[0], zero, jnp.arange(n))
        specs = abstract_decoder(spec, jnp.float32).cache_specs()
        caches = tuple(jnp.zeros((1, *s.shape)) if isinstance(s, StateSpec) else zero for s in specs)
        return apply(weights, batch, caches, DenseRuntime("cpu"))[0]

    return logits


def dense_logits(token_ids: list[int], window: int | None = None, **model: bool) -> np.ndarray:
    """[len(token_ids), V]: the oracle's logits."""
    padded = np.zeros(256, np.int32)
    padded[: len(token_ids)] = token_ids
    return np.asarray(_dense(tiny_spec(window, **model))(jnp.asarray(padded)))[: len(token_ids)]


def assert_greedy(prompt: list[int], output: list[int], window: int | None = None, near_tie: float = 1e-3, **model: bool) -> None:
    """Each output token is the oracle's best, up to near-ties of the logits."""
    logits = dense_logits(prompt + output, window, **model)[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(output)), output]
    assert np.all(chosen >= logits.max(axis=-1) - near_tie), f"not the oracle's tokens: {output} != {logits.argmax(-1)}"


def compiled_inputs() -> ProgramInputs:
    return _programs(16, None, False, False, False, NUM_SLOTS)[1]


def compiled_programs() -> Programs:
    return _programs(16, None, False, False, False, NUM_SLOTS)[2]
