"""Hugging Face folders: config.json, and safetensors files read slice by slice. Reads nothing outside the folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelLoadError
from jaxserve.models.loading.checkpoint_quantization import read_quantization
from jaxserve.models.loading.converted import is_converted
from jaxserve.models.loading.fp8_tensors import is_kv_scale, join_scales
from jaxserve.models.loading.hf_config import generation_defaults, understand_config
from jaxserve.models.loading.mxfp4_tensors import join_blocks
from jaxserve.models.loading.safe_tensor import DTYPES, EIGHT_BITS, SafeTensor, open_file
from jaxserve.models.loading.source import ModelSource, StoredTensor
from jaxserve.models.loading.stored_names import settle_head, with_prefix

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_folder(folder: Path, *, dummy: bool) -> ModelSource:
    """Opens a folder.

    Args:
        dummy: read the config only.

    Raises:
        ModelLoadError: for a file that is missing, malformed or outside the folder.
    """
    raw = _read_json(folder / "config.json", "a Hugging Face folder has one")
    architecture, config, spec = understand_config(raw)
    quantization = None if is_converted(folder) else read_quantization(raw)
    generation_file = folder / "generation_config.json"
    generation = generation_defaults(raw, _read_json(generation_file) if generation_file.exists() else {})
    if dummy:
        return ModelSource(folder, "dummy", architecture, config, spec, generation, _named_dtype(raw), {}, quantization)
    if is_converted(folder):
        return ModelSource(folder, "converted", architecture, config, spec, generation, _named_dtype(raw), {})
    tensors: dict[str, StoredTensor] = {}
    dtypes: Counter[str] = Counter()
    for name, tensor in _open_tensors(folder).items():
        if architecture.is_needed(name):
            tensors[architecture.read_name(name)] = tensor
            if quantization is None or tensor.dtype not in EIGHT_BITS:
                dtypes[_known_dtype(name, tensor)] += 1
    if quantization is not None:
        quantization = replace(quantization, has_kv_scales=quantization.has_kv_scales or any(map(is_kv_scale, tensors)))
        tensors = join_blocks(join_scales(tensors, quantization))
        for name, left in tensors.items():
            if isinstance(left, SafeTensor):
                _known_dtype(name, left)  # what is left must stand for itself
    table = architecture.table(spec)
    tensors, spec = settle_head(with_prefix(tensors, table), table, spec)
    dtype = dtypes.most_common(1)[0][0] if dtypes else "bfloat16"
    return ModelSource(folder, "safetensors", architecture, config, spec, generation, dtype, tensors, quantization)


def _named_dtype(raw: Mapping[str, Any]) -> str:
    """The dtype that config.json names."""
    named = str(raw.get("dtype") or raw.get("torch_dtype"))
    return named if named in DTYPES.values() else "bfloat16"


def _known_dtype(name: str, tensor: SafeTensor) -> str:
    if tensor.dtype not in DTYPES:
        hint = "; weights of 8 bits need scales, and a quantization_config in config.json" if tensor.dtype in EIGHT_BITS else ""
        raise ModelLoadError(f"tensor {name} has dtype {tensor.dtype}, which is not supported; wanted {', '.join(DTYPES)}{hint}")
    return DTYPES[tensor.dtype]


def _open_tensors(folder: Path) -> dict[str, SafeTensor]:
    single, index_file = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return open_file(_inside(folder, single.name))
    if not index_file.exists():
        raise ModelLoadError(_nothing_to_load(folder))
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{index_file} has no weight_map from tensor names to files; download it again")
    files = {file: open_file(_inside(folder, file)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise ModelLoadError(f"{index_file.name} says that tensor {name} is in {file}, but it is not; download both again")
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def _inside(folder: Path, file: str) -> Path:
    """The path of a file that an index names, which must be in the folder.

    Links may not leave it either, but for the Hub's cache, where snapshots/REVISION/FILE links to ../../blobs/HASH.
    """
    root = folder.resolve()
    is_cache = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    allowed = (root, root.parent.parent / "blobs") if is_cache else (root,)
    path = folder / file
    is_plain = not Path(file).is_absolute() and ".." not in Path(file).parts
    if not is_plain or not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ModelLoadError(f"{file!r} leaves the model's folder {folder}. Put the file itself there, not a path or link to it.")
    return path


def _nothing_to_load(folder: Path) -> str:
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return f"{folder} holds pickle files only, which can run code when read. Convert the weights to safetensors."
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"{folder} holds no safetensors; give the path of the GGUF file instead, such as {ggufs[0]}"
    return f"{folder} holds neither model.safetensors nor model.safetensors.index.json; download the weights, or use --load-format dummy"


def _read_json(path: Path, why: str = "") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} is missing; {why}") from None
    except (OSError, ValueError) as e:
        raise ModelLoadError(f"{path} cannot be read as JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value
