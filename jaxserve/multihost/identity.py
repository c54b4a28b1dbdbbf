"""What every process of a group must have alike before they may compute together: versions, source, options, weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import jaxserve
from jaxserve.config import EngineConfig
from jaxserve.models.loading.converted import FOLDER
from jaxserve.models.loading.resolve import resolve_model
from jaxserve.trace_cache import source_digest

_SAMPLES, _SAMPLE_BYTES = 8, 4096  # of each weight file: reading terabytes twice would take longer than serving is worth
_WEIGHTS = (".safetensors", ".gguf")

# Options that do not reach the devices, or only name files, which may lie elsewhere on another host
_OWN = {"model", "tokenizer", "served_model_name", "skip_tokenizer_init", "generation_config", "compilation_cache_dir"}
_OWN |= {"max_num_queued_reqs", "max_num_queued_tokens", "scheduling_policy", "enable_prefix_caching"}

Identity = dict[str, Any]


def identity_of(config: EngineConfig, num_processes: int) -> Identity:
    """What is compared: JSON values.

    Raises:
        ModelLoadError: there is no such model.
    """
    options = {name: value for part in asdict(config).values() for name, value in part.items() if name not in _OWN}
    return {
        "versions": {"jaxserve": jaxserve.__version__, "jax": jax.__version__},
        "source": source_digest(),
        "options": options | {"num_processes": num_processes},
        "model": fingerprint(resolve_model(config.model.model), with_weights=config.model.load_format != "dummy"),
    }


def difference(leader: Identity, other: Identity) -> str | None:
    """What the other process has to change; None where they agree."""
    for part, what in (("versions", "another version"), ("options", "another config")):
        mine, theirs = leader.get(part, {}), other.get(part, {})
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if names:
            shown = ", ".join(f"{name} {theirs.get(name)!r} where process 0 has {mine.get(name)!r}" for name in names)
            return f"it has {what}: {shown}"
    if leader.get("source") != other.get("source"):
        return "its jaxserve is of another source, though of the same version; install the same commit on every host"
    if leader.get("model") != other.get("model"):
        return "it has another model: config.json or the weights differ from those of process 0; copy them anew"
    return None


def fingerprint(path: Path, *, with_weights: bool) -> str:
    """A digest of a model's config, and of names, sizes and samples of its weight files.

    Samples tell checkpoints of one architecture apart; they do not find a single damaged byte.
    """
    digest = hashlib.sha256()
    if path.is_file() and path.suffix != ".gguf":  # a dummy's config.json
        path = path.parent
    if path.is_dir():
        config = json.loads((path / "config.json").read_bytes()) if (path / "config.json").is_file() else None
        digest.update(json.dumps(config, sort_keys=True).encode())
    for file in _weight_files(path) if with_weights or path.is_file() else ():  # a .gguf file is its own config
        digest.update(f"{file.relative_to(path) if file != path else ''} {file.stat().st_size}".encode())
        _sample(file, digest)
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [file for file in path.iterdir() if file.suffix in _WEIGHTS]
    return sorted([*found, *(file for file in (path / FOLDER).rglob("*") if file.is_file())])


def _sample(file: Path, digest: Any) -> None:
    last = max(0, file.stat().st_size - _SAMPLE_BYTES)
    with file.open("rb") as content:
        for number in range(_SAMPLES):
            content.seek(last * number // (_SAMPLES - 1))
            digest.update(content.read(_SAMPLE_BYTES))
