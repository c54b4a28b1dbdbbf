"""The reference cases under tests/goldens, read with numpy alone. make_goldens.py says what they hold and makes them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
NAMES = sorted(p.parent.name for p in FOLDER.glob("*/golden.npz"))
Tensors = dict[str, np.ndarray]


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of one tensor: normal, with a spread wide enough that a wrong rope, mask or norm shows in the logits."""
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    return (rng.standard_normal(shape) * (1.2 / shape[-1] ** 0.5)).astype(np.float32)


def read_config(case: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / case / "config.json").read_text())
    return config


def read_tensors(case: str) -> Tensors:
    """Every tensor of the case's checkpoint, by its name there."""
    shapes = json.loads((FOLDER / case / "tensors.json").read_text())
    with np.load(FOLDER / case / "small.npz") as small:
        return {n: draw(n, tuple(s)) for n, s in shapes.items()} | {n: small[n] for n in small.files}


def read_golden(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [2, 48] and the logits [2, 48, V] that transformers computes for them."""
    with np.load(FOLDER / case / "golden.npz") as golden:
        return golden["tokens"], golden["logits"].astype(np.float32)


def write_checkpoint(
    folder: Path, case: str, *, config: dict[str, Any] | None = None, tensors: Tensors | None = None, num_files: int = 1
) -> Path:
    """Writes a case as a Hugging Face folder: config.json, and one model.safetensors or num_files shards with their index.

    Args:
        config: instead of the case's own.
        tensors: instead of the case's own.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = read_tensors(case) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(read_config(case) if config is None else config))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = {n: tensors[n] for n in sorted(tensors)[i::num_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
