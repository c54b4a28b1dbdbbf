"""From a MODEL argument to arrays on devices: open_source, then describe_model, then load_weights."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxserve.errors import ModelLoadError
from jaxserve.models.description import ModelDescription, Quantization, describe_decoder
from jaxserve.models.interface import ShardingFor
from jaxserve.models.loading.converted import read_converted, save_converted
from jaxserve.models.loading.hf_folder import open_folder
from jaxserve.models.loading.resolve import resolve_model
from jaxserve.models.loading.source import ModelSource
from jaxserve.models.loading.weights import OnProgress, draw_weights, keep_fp8, read_weights, store_weights

__all__ = [
    "ModelDescription",
    "ModelSource",
    "describe_model",
    "load_weights",
    "open_source",
    "resolve_dtype",
    "save_converted",
]


def open_source(model: str, load_format: str = "auto") -> ModelSource:
    """Finds a model and reads its config and the names of its tensors.

    Args:
        model: a folder, a .gguf file, hf:org/name, or a name of the catalogue.
        load_format: "auto", or "dummy" to need a config only.

    Raises:
        ModelLoadError: if it is missing, malformed or of an unknown architecture.
    """
    path, dummy = resolve_model(model), load_format == "dummy"
    if path.is_dir():
        return open_folder(path, dummy=dummy)
    if path.suffix == ".gguf":
        from jaxserve.models.loading.gguf_source import open_gguf_source

        return open_gguf_source(path, dummy=dummy)
    if dummy and path.name == "config.json":
        return open_folder(path.parent, dummy=True)
    raise ModelLoadError(f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json")


def describe_model(
    source: ModelSource,
    *,
    dtype: DTypeLike,
    kv_repeat: Callable[[int], int] = lambda num_kv_heads: 1,
    context: int | None = None,
    quantization: Quantization | None = None,
    keep_quantized: bool = False,
    outputs_first: bool = False,
) -> ModelDescription:
    """The model's parameters and its forward function, before any weight is read.

    Args:
        context: longest text, if the model has other ropes for longer ones; by default the first that it was made for.
        quantization: of the layers' matmuls, done while the weights load.
        kv_repeat: how often to hold each kv head, from the number that a layer's checkpoint has.
        keep_quantized: multiply by 8-bit weights that the checkpoint holds, where it has a scale for each channel or for
            all; otherwise, and where it has one for each block, they are dequantised while they load.
        outputs_first: hold the weights of matmuls as the checkpoint does, which suits CPUs.
    """
    spec = source.spec.with_kv_repeat(kv_repeat).for_context(context)
    model = describe_decoder(source.architecture.name, spec, dtype, quantization, outputs_first=outputs_first)
    return keep_fp8(model, source) if keep_quantized else model


def load_weights(
    source: ModelSource,
    model: ModelDescription,
    *,
    sharding_for: ShardingFor,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[jax.Array, ...]:
    """What model.apply takes: read from the checkpoint, each device its own slice; drawn at random for a dummy.

    Args:
        seed: of dummy weights.

    Raises:
        ModelLoadError: if a tensor is missing, left over or of the wrong shape.
    """
    if source.kind == "converted":
        arrays = read_converted(model, source, sharding_for)
        return store_weights(model, arrays, sharding_for)
    if source.kind == "dummy":
        return draw_weights(model, sharding_for, seed, on_progress)
    return read_weights(model, source, sharding_for, on_progress)


def resolve_dtype(option: str, platform: str, source: ModelSource) -> jnp.dtype:
    """The dtype of weights and activations.

    Args:
        option: "float32", "bfloat16", or "auto": float32 on a CPU, where bfloat16 is slower; elsewhere the checkpoint's,
            with float32 and float16 (and so what a GGUF dequantises to) rounded to bfloat16, which is the fastest.
        platform: "cpu", "gpu" or "tpu".
    """
    if option == "auto":
        rounded = {"float32": "bfloat16", "float16": "bfloat16"}.get(source.checkpoint_dtype, source.checkpoint_dtype)
        option = "float32" if platform == "cpu" else rounded
    return jnp.dtype(option)
