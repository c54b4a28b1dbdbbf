"""Tensors of safetensors files, mapped. Knows no folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ModelLoadError
from jaxserve.models.families.assembly import Index, Shape

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Of numbers that stand for themselves: safetensors' names and NumPy's."""

FP8 = "F8_E4M3"
EIGHT_BITS = {FP8: ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "U8": np.uint8}
"""Of numbers that mean something together with others."""

_NUMPY = {ours: np.dtype(getattr(ml_dtypes, name, name)) for ours, name in DTYPES.items()} | EIGHT_BITS


@dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file.

    Attributes:
        raw: its bytes, mapped.
        dtype: as the file names it.
    """

    raw: np.ndarray
    shape: Shape
    dtype: str

    def read(self, index: Index) -> np.ndarray:
        values: np.ndarray = self.raw.view(_NUMPY[self.dtype]).reshape(self.shape)
        return values[index]


def open_file(path: Path) -> dict[str, SafeTensor]:
    """A file's tensors, not read yet.

    Raises:
        ModelLoadError: the file is missing or damaged.
    """
    if not path.exists():
        raise ModelLoadError(f"{path} is missing, though the model's index names it; download it again")
    try:
        safe_open(path, "numpy")  # checks the header: every tensor lies in the file, and none in another
    except (SafetensorError, OSError) as e:
        raise ModelLoadError(f"{path} is not a whole safetensors file ({e}); download it again") from e
    file = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array, whose slices are made faster
    start = 8 + int(file[:8].view("<u8")[0])
    header = json.loads(bytes(file[8:start]))
    header.pop("__metadata__", None)
    return {name: _tensor(file[start:], **entry) for name, entry in header.items()}


def _tensor(data: np.ndarray, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> SafeTensor:
    return SafeTensor(data[slice(*data_offsets)], tuple(shape), dtype)
