"""Converts a model once, so that later starts read parameters as the devices hold them."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxserve.config import EngineConfig
from jaxserve.models.loading import describe_model, load_weights, open_source, resolve_dtype, save_converted
from jaxserve.models.loading.weights import OnProgress
from jaxserve.sharding import Shardings, make_mesh


def convert_model(config: EngineConfig, folder: Path, *, on_progress: OnProgress | None = None) -> int:
    """Reads the model onto tensor_parallel_size devices and writes the folder.

    Returns:
        Bytes of the parameters.

    Raises:
        ConfigError, ModelLoadError: the model cannot be read, or the folder not written.
    """
    source = open_source(config.model.model, config.model.load_format)
    mesh = make_mesh(config.parallel.tensor_parallel_size)
    # As for a GPU or a TPU wherever this runs: their dtype is the checkpoint's.
    dtype = resolve_dtype(config.model.dtype, "gpu", source)
    model = describe_model(source, dtype=dtype)
    weights = load_weights(source, model, sharding_for=Shardings(mesh).of, seed=config.model.seed, on_progress=on_progress)
    save_converted(folder, source, model, weights)
    return sum(w.nbytes for w in jax.tree.leaves(weights))
