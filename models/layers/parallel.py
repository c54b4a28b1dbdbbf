"""Several mixers side by side, on the same input, whose outputs are added."""

from __future__ import annotations

from itertools import islice
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxserve.models.interface import AnyCacheSpec, Runtime, StepBatch
from jaxserve.models.layers.rope import Rotation
from jaxserve.models.spec import ParallelSpec


class Parallel(nnx.Module):
    """The sum of out_multiplier * mixer(in_multiplier * x) over the branches; they share one rope at most."""

    def __init__(self, spec: ParallelSpec, branches: list[Any]) -> None:
        self.spec = spec
        self.branches: Any = nnx.List(branches)

    def __call__(
        self, x: Float[Array, "T D"], caches: tuple[Array, ...], batch: StepBatch, rotation: Rotation | None, runtime: Runtime
    ) -> tuple[Float[Array, "T D"], tuple[Array, ...]]:
        """See Mixer."""
        remaining, new_caches, outputs = iter(caches), [], []
        for branch, mixer in zip(self.spec.branches, self.branches, strict=True):
            own = tuple(islice(remaining, len(mixer.cache_specs())))
            y, own = mixer(x * branch.in_multiplier, own, batch, rotation, runtime)
            outputs.append(y * branch.out_multiplier)
            new_caches += own
        return sum(outputs[1:], outputs[0]), tuple(new_caches)

    def cache_specs(self) -> tuple[AnyCacheSpec, ...]:
        """What the branches keep, one after the other."""
        return tuple(spec for mixer in self.branches for spec in mixer.cache_specs())
