"""Where compiled programs are kept between starts."""

from __future__ import annotations

import logging
from tempfile import TemporaryFile

import jax

from jaxserve.config import GIB, CompileConfig

log = logging.getLogger(__name__)

MAX_BYTES = 16 * GIB  # with a limit, jax locks the folder, and nobody reads a program that is half written


def use_compile_cache(config: CompileConfig) -> None:
    """Tells jax where to keep what it compiles, unless somebody else has. A folder that cannot be written is left out."""
    path = config.cache_path
    if path is None or (jax.config.jax_compilation_cache_dir and config.compilation_cache_dir is None):
        return  # the program that we live in has chosen already, or JAX_COMPILATION_CACHE_DIR has
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it will be run
        with TemporaryFile(dir=path):
            pass
    except OSError as e:
        log.warning("the compile cache %s cannot be written (%s): programs are compiled anew at each start", path, e.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
