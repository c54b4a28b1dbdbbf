"""The weights in use, by name, and the checks that others must pass to take their place. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.errors import WeightsError
from jaxserve.step import Weights

MAX_NAMED = 3  # how many wrong parameters an error lists


class WeightStore:
    """Holds the weights. Never deletes them: they may be somebody else's too.

    Attributes:
        arrays: in the order in which the programs take them.
        version: how often they were replaced.
    """

    def __init__(self, names: Sequence[str], abstract: Sequence[jax.ShapeDtypeStruct], arrays: Weights) -> None:
        """abstract: shape, dtype and sharding of each array."""
        self.arrays = arrays
        self.version = 0
        self._abstract = dict(zip(names, abstract, strict=True))

    @property
    def tree(self) -> dict[str, jax.Array]:
        """The arrays by name, such as "layers.0.mixer.qkv"."""
        return dict(zip(self._abstract, self.arrays, strict=True))

    def replace(self, arrays: Weights) -> int:
        """Takes what `place` has given; returns the version that this makes."""
        self.arrays = arrays
        self.version += 1
        return self.version

    def drop(self) -> None:
        """Lets go of the arrays, for good."""
        self.arrays = ()
        self._abstract = {}

    def place(self, tree: Any) -> Weights:
        """The tree's arrays as the programs take them.

        Args:
            tree: one array for each parameter: a dict by name, or nested containers whose keys make up the names, such as
                {"layers": [{"mixer": {"qkv": ...}}]}, or an nnx.State. An array that lies as it should is not copied.

        Raises:
            WeightsError: a name is missing or unknown, a shape or dtype differs, or an array is deleted or no array; or the
                weights lie on several hosts.
        """
        if not all(array.sharding.is_fully_addressable for array in self._abstract.values()):
            raise WeightsError("weights on several hosts cannot be replaced; start the group again with the new ones")
        arrays = _by_name(tree)
        missing = [name for name in self._abstract if name not in arrays]
        unknown = [name for name in arrays if name not in self._abstract]
        if missing or unknown:
            parts = [f"{what} {_some(names)}" for what, names in (("lack", missing), ("hold unknown", unknown)) if names]
            raise WeightsError(
                f"the weights {' and '.join(parts)}; give what `params` holds: {len(self._abstract)} arrays by name"
            )
        wrong = [text for name, wanted in self._abstract.items() if (text := _mismatch(name, arrays[name], wanted))]
        if wrong:
            raise WeightsError(f"weights do not fit the model: {_some(wrong, '; ')}")
        placed: list[jax.Array] = jax.device_put(
            [arrays[n] for n in self._abstract], [a.sharding for a in self._abstract.values()]
        )
        return tuple(placed)


def _by_name(tree: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [_key(entry) for entry in path]
        name = ".".join(keys[:-1] if keys[-1:] == ["value"] else keys)  # the leaf of an nnx.Variable
        if name in arrays:
            raise WeightsError(f"the weights hold {name} twice; give each parameter once")
        arrays[name] = leaf
    return arrays


def _key(entry: Any) -> str:
    """One part of a path: what jax calls key, idx or name, by the kind of container."""
    return str(next(getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind)))


def _mismatch(name: str, array: Any, wanted: jax.ShapeDtypeStruct) -> str | None:
    if not isinstance(array, jax.Array | np.ndarray):
        return f"{name} is a {type(array).__name__}, not an array"
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        return f"{name} is {array.dtype}{list(array.shape)}, not {wanted.dtype}{list(wanted.shape)}"
    if isinstance(array, jax.Array) and array.is_deleted():
        return f"{name} is deleted (was it donated?)"
    return None


def _some(texts: Sequence[str], separator: str = ", ") -> str:
    more = len(texts) - MAX_NAMED
    return separator.join(texts[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
