"""Traced programs, kept as StableHLO beside the compile cache: a second start on an accelerator traces nothing.

Tracing is most of a second start: 16 s for Qwen3-0.6B's programs, the compiled ones being at hand. An entry is found by the
source code of this package, jax's version and settings, the program's arguments and whatever else its maker names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax import export

import jaxserve
from jaxserve.shaping import Shaping
from jaxserve.step import DeviceState, ForwardResults

if TYPE_CHECKING:
    from jaxserve.programs import Program

Trace = Callable[["Program", str], export.Exported]
"""Traces a program for a platform."""

log = logging.getLogger(__name__)

_PLATFORMS = {"gpu": "cuda", "cpu": "cpu", "tpu": "tpu"}
_KEPT_S = 30 * 24 * 3600  # since its last use; every change of the code or the options makes new entries
# Not promised to stay; the jax version is in the key.
_CUSTOM_CALLS = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton", "AllocateBuffer", "tpu_custom_call")


def _register_types() -> None:
    for kind in (DeviceState, ForwardResults, Shaping):
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"jaxserve.{kind.__name__}",
            serialize_auxdata=lambda auxdata: b"",
            deserialize_auxdata=lambda data: (),
        )


_register_types()


class TraceCache:
    """A folder of traced programs."""

    def __init__(self, folder: Path, maker: str) -> None:
        """maker: all that the programs depend on besides code and arguments, such as the model's spec."""
        self._folder = folder
        made_by = (jax.__version__, version("jaxlib"), source_digest(), sorted(jax.config.values.items()), maker)
        self._key = hashlib.sha256(repr(made_by).encode())
        _drop_old(folder)

    def lacks(self, programs: Sequence[Program], platform: str) -> int:
        """How many of them would be traced."""
        return sum(not self._path(program, platform).exists() for program in programs)

    def lower(self, program: Program, platform: str, trace: Trace | None = None) -> jax.stages.Lowered:
        """Traces and lowers a program, or takes it from the folder.

        Args:
            trace: what to trace it with; this process, if it is left out.
        """
        if platform == "gpu":
            importlib.import_module("jax.experimental.mosaic.gpu")  # loads the library that kernels call, as tracing one would
        path = self._path(program, platform)
        exported = _read(path)
        if exported is None:
            exported = (trace or trace_here)(program, platform)
            _write(path, exported)
        # Both ways pass through the same call, so that both find the same compiled program.
        return program.jitted(exported.call).lower(*program.arguments)

    def _path(self, program: Program, platform: str) -> Path:
        key = self._key.copy()
        leaves, tree = jax.tree.flatten((program.arguments, program.results, program.out_shardings))
        described = (
            program.name,
            program.key,
            program.donated,
            program.options,
            platform,
            str(tree),
            [_described(x) for x in leaves],
        )
        key.update(repr(described).encode())
        return self._folder / f"{key.hexdigest()}.stablehlo"


def trace_here(program: Program, platform: str) -> export.Exported:
    """Traces a program in this process."""
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    return export.export(program.jitted(), platforms=(_PLATFORMS[platform],), disabled_checks=checks)(*program.arguments)


def _described(leaf: Any) -> str:
    """An argument's shape, type and place; or a result's place."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return f"{leaf.shape} {leaf.dtype} {leaf.sharding}"
    return str(leaf)


@functools.cache
def source_digest() -> str:
    """A digest of this package's source: what a trace depends on, and more."""
    digest = hashlib.sha256()
    root = Path(jaxserve.__file__).parent
    files = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    for path in sorted(path for path in files if path.suffix == ".py"):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _drop_old(folder: Path) -> None:
    """Removes what no start has asked for in a month."""
    with contextlib.suppress(OSError):
        for path in folder.glob("*.stablehlo"):
            if path.stat().st_mtime < time.time() - _KEPT_S:
                path.unlink()


def _read(path: Path) -> export.Exported | None:
    try:
        data = bytearray(path.read_bytes())
        with contextlib.suppress(OSError):
            os.utime(path)
        return export.deserialize(data)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  a damaged file raises whatever its parser meets; the program is traced instead
        log.warning("%s is damaged (%s) and will be replaced", path, error)
        return None


def _write(path: Path, exported: export.Exported) -> None:
    """Whole or not at all; a folder that cannot be written costs time, not the start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(exported.serialize())
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the trace cache cannot be written: %s", error)
        with contextlib.suppress(OSError, UnboundLocalError):
            os.unlink(file.name)
