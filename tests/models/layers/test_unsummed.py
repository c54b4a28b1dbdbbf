"""Into how many parts products of few rows are cut."""

from __future__ import annotations

import pytest

from jaxserve.models.layers.unsummed import split_count


@pytest.mark.parametrize(
    "inputs, outputs, count",
    [(4096, 6144, 2), (4096, 4096, 4), (14336, 4096, 8), (4096, 28672, 1)]
    + [(1024, 4096, 4), (2048, 1024, 8), (3072, 1024, 8), (1024, 6144, 2)]
    + [(2048, 5120, 2), (4096, 2048, 8), (2880, 5120, 2), (4096, 2880, 4)],
)
def test_as_was_quickest(inputs: int, outputs: int, count: int) -> None:
    """Of Llama-3.1-8B (bench/kernels/split_products.py), and by the same rule of Qwen3-0.6B and others."""
    assert [split_count(rows, inputs, outputs) for rows in (16, 64, 256)] == [count, count, 1]


def test_parts_are_equal_and_of_whole_vectors() -> None:
    assert split_count(64, 1000, 128) == 1
