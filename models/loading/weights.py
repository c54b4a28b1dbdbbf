"""Fills a ModelDescription's parameters: each device reads only its slice. Knows no file format and no mesh."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import numpy as np
from jax.sharding import Sharding

from jaxserve.errors import ModelLoadError
from jaxserve.models.description import ModelDescription, Parameter
from jaxserve.models.families.assembly import Assembly, Index, Target
from jaxserve.models.interface import ShardingFor
from jaxserve.models.layers.quantized import FP8_MAX, inputs_last, put_inputs_last, quantize_fp8
from jaxserve.models.loading.kept_fp8 import can_keep, choose_form, load_kept, turner
from jaxserve.models.loading.placing import place_parts
from jaxserve.models.loading.source import ModelSource

OnProgress = Callable[[str, int, int], None]
"""Takes (stage, parameters done, their total); called from the thread that loads."""

_HARMLESS = re.compile(r".*rotary_emb\.inv_freq$")  # computed here; old checkpoints carry them
_DUMMY_INPUT_SCALE = np.float32(10 / FP8_MAX)  # of activations near 1
_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class _Job:
    """One parameter, and the checkpoint tensors that make it up."""

    parameter: Parameter
    target: Target
    assembly: Assembly
    names: tuple[str, ...]


def read_weights(
    model: ModelDescription, source: ModelSource, sharding_for: ShardingFor, on_progress: OnProgress | None = None
) -> tuple[jax.Array, ...]:
    """Reads every parameter, in the model's order.

    Raises:
        ModelLoadError: before anything is read, if a tensor is missing, left over or of the wrong shape.
    """
    jobs = list(_plan(model, source))
    _check(jobs, model, source)
    source.architecture.verify(model.spec, source.tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(_load, job, source, sharding_for) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if on_progress:
                    on_progress("weights", done, len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(array for future in futures for array in future.result())


def keep_fp8(model: ModelDescription, source: ModelSource) -> ModelDescription:
    """The model with those matmuls in 8 bits whose weights the checkpoint holds so, a scale for each channel or for all."""
    if source.quantization is None:
        return model
    if source.kind == "dummy":
        kept = [source.quantization.block is None for _ in model.parameters]
    else:
        kept = [can_keep([source.tensors[name] for name in job.names if name in source.tensors]) for job in _plan(model, source)]
    forms = (choose_form(p, source.quantization, is_kept) for p, is_kept in zip(model.parameters, kept, strict=True))
    return replace(model, parameters=tuple(replace(p, form=form) for p, form in zip(model.parameters, forms, strict=True)))


def _plan(model: ModelDescription, source: ModelSource) -> Iterator[_Job]:
    table = source.architecture.table(model.spec)
    for parameter in model.parameters:
        match = _LAYER.match(parameter.path)
        number = match[1] if match else ""
        layer = model.spec.layers[int(number)] if match else None
        assembly = table.get(parameter.path) or table[_LAYER.sub("layers.{i}.", parameter.path)]
        target = Target(parameter.path, parameter.abstract.shape, layer)
        assembly = assembly.choose(target, partial(_shape_of, source, number))
        yield _Job(parameter, target, assembly, tuple(name.replace("{i}", number) for name in assembly.names(target)))


def _shape_of(source: ModelSource, layer: str, name: str) -> tuple[int, ...] | None:
    tensor = source.tensors.get(name.replace("{i}", layer))
    return None if tensor is None else tensor.shape


def _check(jobs: list[_Job], model: ModelDescription, source: ModelSource) -> None:
    wanted = {name: shape for job in jobs for name, shape in zip(job.names, job.assembly.shapes(job.target), strict=True)}
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise ModelLoadError(f"{source.path} lacks {_some(missing)}, which {source.architecture.name} needs. Is it complete?")
    for name, shape in wanted.items():
        got = source.tensors[name].shape
        if got != shape:
            raise ModelLoadError(f"tensor {name} has shape {list(got)}; the config wants {list(shape)}. Do they belong together?")
    spare = re.compile(source.architecture.spare or "(?!)")
    left = [name for name in source.tensors if name not in wanted]
    extra = [name for name in left if not _HARMLESS.match(name) and not spare.search(name)]
    if extra:
        raise ModelLoadError(
            f"{source.path} holds {_some(extra)}, which {source.architecture.name} has no use for: "
            f"the config does not describe this checkpoint, or it is of another architecture."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _load(job: _Job, source: ModelSource, sharding_for: ShardingFor) -> tuple[jax.Array, ...]:
    parameter, stored = job.parameter, [source.tensors[name] for name in job.names]
    if parameter.is_quantized and can_keep(stored):
        return load_kept(stored, parameter, job.target, job.assembly, sharding_for)
    read = partial(job.assembly.read, [tensor.read for tensor in stored], job.target)

    def read_turned(index: Index) -> np.ndarray:
        outputs = len(index) - parameter.turned
        return read((*index[outputs:], *index[:outputs])).transpose(inputs_last(len(index), parameter.turned))

    abstract, axes = parameter.unquantized
    placed = place_parts(abstract.shape, abstract.dtype, sharding_for(axes, abstract.shape), read_turned)
    return _stored(placed, parameter, sharding_for) if parameter.is_quantized else (placed,)


def draw_weights(
    model: ModelDescription, sharding_for: ShardingFor, seed: int = 0, on_progress: OnProgress | None = None
) -> tuple[jax.Array, ...]:
    """Random weights, drawn where they will live: normal, of a size that keeps activations near 1, the same for a seed."""
    key = jax.random.key(seed)
    weights: list[jax.Array] = []
    for done, parameter in enumerate(model.parameters, start=1):
        abstract, axes = parameter.unquantized
        draw = _drawer(parameter.abstract.shape, abstract.dtype, parameter.turned, sharding_for(axes, abstract.shape))
        drawn = draw(key, np.uint32(zlib.crc32(parameter.path.encode())), parameter.mean, parameter.std)
        weights += _stored(drawn, parameter, sharding_for) if parameter.is_quantized else (drawn,)
        if on_progress:
            on_progress("weights", done, len(model.parameters))
    return tuple(weights)


@cache
def _drawer(shape: tuple[int, ...], dtype: np.dtype, turned: int, sharding: Sharding) -> Callable[..., jax.Array]:
    """The program that draws one parameter; there are few, as layers are alike."""

    def draw(key: jax.Array, name: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, name), shape, dtype)
        return put_inputs_last((mean + std * noise).astype(dtype), turned)

    return jax.jit(draw, out_shardings=sharding)


def store_weights(model: ModelDescription, arrays: tuple[jax.Array, ...], sharding_for: ShardingFor) -> tuple[jax.Array, ...]:
    """The arrays that the forward function takes, from the parameters as a checkpoint has them."""
    pairs = zip(model.parameters, arrays, strict=True)
    return tuple(stored for parameter, array in pairs for stored in _stored(array, parameter, sharding_for))


def _stored(array: jax.Array, parameter: Parameter, sharding_for: ShardingFor) -> tuple[jax.Array, ...]:
    """The arrays that the forward function takes for a parameter."""
    if not parameter.is_quantized or parameter.contract is None:
        if not parameter.turned:
            return (array,)
        abstract, axes = parameter.unquantized
        turned = turner(parameter.turned, 0, sharding_for(axes, abstract.shape))(array)
        array.delete()
        return (turned,)
    shardings = tuple(sharding_for(axes, abstract.shape) for abstract, axes in parameter.arrays)
    values, scales = _quantizer(parameter.contract, parameter.batch, shardings[:2])(array)
    array.delete()
    inputs = (jax.device_put(_DUMMY_INPUT_SCALE, shardings[2]),) if parameter.form == "fp8_static" else ()
    return values, scales, *inputs


@cache
def _quantizer(contract: int, batch: int, shardings: tuple[Sharding, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """The program that quantises parameters on the devices where they are."""

    def quantize(w: jax.Array) -> tuple[jax.Array, ...]:
        weight = quantize_fp8(w, contract, batch)
        return weight.values, weight.scales

    return jax.jit(quantize, out_shardings=shardings)
