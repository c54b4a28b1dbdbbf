"""GGUF files: metadata, and tensors dequantised in parts. Knows the container, not what a model means by it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package dequantises; the header is read here,
as the package takes seconds for a vocabulary of 50,000 tokens.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<?", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_AXES = 4  # GGML's own limit


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in its quantised form.

    Attributes:
        shape: slowest axis first, as numpy has it.
        kind: its GGML type.
        data: [rows, bytes of a row], a view of the file; a vector is one row.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    data: np.ndarray

    def rows(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows in float32, as an own copy: [rows, row length]."""
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(self.kind)
        try:
            return np.array(quants.dequantize(self.data[rows], kind), np.float32)
        except NotImplementedError as e:
            raise ModelLoadError(f"tensor {self.name} is of GGML type {kind.name}, which cannot be read; use another file") from e


@dataclass(frozen=True)
class GgufFile:
    """An opened file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Reads the header; tensors stay on disk until their rows are read.

    Raises:
        ModelLoadError: if the file is not a whole GGUF of version 2 or 3.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Reader(path, data).read()
    except (OSError, struct.error, ValueError, TypeError, LookupError, ArithmeticError) as e:
        raise ModelLoadError(f"{path} is not a whole GGUF file ({e}); download it again") from e


class _Reader:
    """A cursor over the file. Errors are ValueErrors and struct.errors; open_gguf names the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def read(self) -> GgufFile:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"wanted version 2 or 3, little-endian; got {version}")
        num_tensors, num_fields = self.scalar("<Q"), self.scalar("<Q")
        metadata = {}
        for _ in range(num_fields):
            name = self.string()
            metadata[name] = self.value(self.scalar("<I"))
        if metadata.get("split.count", 1) > 1:
            raise ValueError("it is one of several; merge them with llama-gguf-split --merge")
        infos = [self.tensor_info() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        return GgufFile(self.path, metadata, tensors)

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends at byte {len(self.data)}, within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        (value,) = self.numbers(kind, 1)
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-05 as it was written, not 9.99999974e-06

    def array(self) -> list[Any]:
        kind, size = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            return [self.string() for _ in range(size)]
        return self.numbers(kind, size)

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is not known")
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_axes = self.string(), self.scalar("<I")
        if not 1 <= num_axes <= _MAX_AXES:
            raise ValueError(f"tensor {name} has {num_axes} axes")
        shape = tuple(self.scalar("<Q") for _ in range(num_axes))[::-1]  # GGML has the fastest axis first
        return name, shape, self.scalar("<I"), self.scalar("<Q")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        *outer, row = shape
        num_rows = 1
        for size in outer:
            num_rows *= size
        row_bytes, rest = divmod(row * block_bytes, block)
        if rest or min(shape) < 1:
            raise ValueError(f"tensor {name} of shape {shape} does not fit its type's blocks of {block}")
        if start + num_rows * row_bytes > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, before the end of tensor {name}")
        data = np.frombuffer(self.data, np.uint8, num_rows * row_bytes, start).reshape(num_rows, row_bytes)
        return GgufTensor(name, shape, kind, data)
