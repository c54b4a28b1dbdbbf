"""Converted models: a Hugging Face folder whose weights are our own parameters in an orbax checkpoint, for any mesh."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.errors import ModelLoadError
from jaxserve.models.description import ModelDescription, Parameter, describe_decoder
from jaxserve.models.interface import ShardingFor
from jaxserve.models.loading.source import ModelSource

FOLDER = "jaxserve_weights"
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def save_converted(folder: Path, source: ModelSource, model: ModelDescription, weights: tuple[jax.Array, ...]) -> None:
    """Writes the model's parameters, each device its own part, and the other files of the folder that it came from.

    Args:
        model: with each kv head once (kv_repeat 1), so that any mesh can read it.

    Raises:
        ModelLoadError: the folder is not empty, or the model did not come from a folder.
    """
    if not source.path.is_dir():
        raise ModelLoadError(f"{source.path} is no folder; only models of Hugging Face folders can be converted")
    if folder.exists() and any(folder.iterdir()):
        raise ModelLoadError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.path.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(file, folder / file.name)
    with _checkpointer() as checkpointer:
        values = {p.path: w for p, w in zip(model.parameters, weights, strict=True)}
        checkpointer.save(folder.resolve() / FOLDER, values)


def is_converted(folder: Path) -> bool:
    return (folder / FOLDER).is_dir()


def read_converted(model: ModelDescription, source: ModelSource, sharding_for: ShardingFor) -> tuple[jax.Array, ...]:
    """Reads every parameter, in the model's order; each device reads only its part.

    Raises:
        ModelLoadError: the checkpoint is not of this model.
    """
    stored = describe_decoder(model.name, source.spec, model.abstract[0].dtype).parameters
    wanted = {
        p.path: jax.ShapeDtypeStruct(p.abstract.shape, p.abstract.dtype, sharding=sharding_for(p.axes, p.abstract.shape))
        for p in stored
    }
    path = source.path.resolve() / FOLDER
    try:
        with _checkpointer() as checkpointer:
            _check_shapes(checkpointer.metadata(path), wanted, source)
            values = checkpointer.restore(path, wanted)
    except (ValueError, OSError, KeyError) as e:
        raise ModelLoadError(f"{path} is no whole checkpoint of {model.name} ({e}); convert the model again") from e
    return tuple(_fit(values[p.path], p, sharding_for) for p in model.parameters)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]  # heavy, and only converted models need it

    return ocp.StandardCheckpointer()


def _check_shapes(metadata: Any, wanted: dict[str, jax.ShapeDtypeStruct], source: ModelSource) -> None:
    tree = getattr(getattr(metadata, "item_metadata", metadata), "tree", metadata)
    got = {name: tuple(value.shape) for name, value in dict(tree).items()}
    shapes = {name: value.shape for name, value in wanted.items()}
    for name in got.keys() | shapes.keys():
        if got.get(name) != shapes.get(name):
            raise ModelLoadError(
                f"parameter {name} of {source.path} has shape {got.get(name)}; the config wants {shapes.get(name)}. "
                "Convert the model again."
            )


def _fit(value: jax.Array, parameter: Parameter, sharding_for: ShardingFor) -> jax.Array:
    """The parameter of a model that holds kv heads several times, from the one that holds each once."""
    shape = parameter.abstract.shape
    if value.shape == shape:
        return value
    repeat = _repeat_qkv if ".qkv" in parameter.path else _repeat_heads
    axis = len(shape) - 3 if ".qkv" in parameter.path else 0
    times = shape[axis] // value.shape[axis]
    sharding = sharding_for(parameter.axes, shape)
    fitted: jax.Array = jax.jit(repeat, static_argnums=1, out_shardings=sharding)(value, times)
    return fitted


def _repeat_qkv(qkv: Float[Array, "*D K G+2 H"], times: int) -> Float[Array, "*D K2 G2 H"]:
    *inputs, heads, _, head_dim = qkv.shape
    q = qkv[..., :-2, :].reshape(*inputs, heads * times, -1, head_dim)
    return jnp.concatenate((q, jnp.repeat(qkv[..., -2:, :], times, axis=-3)), axis=-2)


def _repeat_heads(gain: Float[Array, "K H"], times: int) -> Float[Array, "K2 H"]:
    return jnp.repeat(gain, times, axis=0)
