"""The engine's options as a part of a command line. Knows no command."""

from __future__ import annotations

import argparse
import inspect
import os
from dataclasses import fields
from typing import Any

from jaxserve.cli_flags import Fields, add_flags
from jaxserve.config import EngineConfig, option_fields
from jaxserve.errors import ConfigError

ENGINE_OPTIONS: Fields = {f.name: f for _, f in option_fields()}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a group of flags for each part of the config; the model itself is not among them."""
    for part in fields(EngineConfig):
        options = [f for name, f in option_fields() if name == part.name and f.name != "model"]
        add_flags(parser, part.name, inspect.getdoc(part.default_factory) or "", options)


def engine_config(options: dict[str, Any]) -> EngineConfig:
    """The config, with the environment set up for it; must run before jax is imported."""
    config = EngineConfig.from_options(**options)
    if not config.model.model:
        raise ConfigError("no model: give MODEL, or `model:` in the --config file")
    # What jaxserve does not fill is left to the runtime's own buffers, hence a little above.
    fraction = min(0.98, config.cache.gpu_memory_utilization + 0.05)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.2f}")
    return config
