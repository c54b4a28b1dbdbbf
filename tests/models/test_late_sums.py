"""Which layers leave their sums to norms; that these give what others give is tests/pallas_kernels/test_collectives.py's, and test_quantized's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.models import late_sums
from jaxserve.models.decoder import abstract_decoder
from jaxserve.models.spec import DecoderSpec, Shares
from tests.tiny import tiny_spec


def served(spec: DecoderSpec) -> list[bool]:
    return [late_sums.serves(layer) for layer in abstract_decoder(spec, jnp.float32).layers]


def test_plain_layers_are_served() -> None:
    assert all(served(tiny_spec(window=8)))
    assert all(served(replace(tiny_spec(), embed_scale=2.0, logit_softcap=30.0, tie_embeddings=True)))
    assert served(tiny_spec(recurrent=True)) == [False, True, False], "each layer by itself"


@pytest.mark.parametrize(
    "change",
    [
        {"residual_multiplier": 0.5},
        {"norm_placement": "post"},
        {"layer_gain": True},
        {"norm": replace(tiny_spec().norm, kind="layer")},
        {"norm": replace(tiny_spec().norm, gain=False)},
    ],
    ids=str,
)
def test_models_that_do_more_are_not_served(change: dict[str, Any]) -> None:
    assert not any(served(replace(tiny_spec(), **change)))


@pytest.mark.parametrize(
    "part, change", [("mixer", {"out_bias": True}), ("mlp", {"bias": True}), ("mlp", {"out_multiplier": 0.5})]
)
def test_layers_that_do_more_are_not_served(part: str, change: dict[str, Any]) -> None:
    spec = tiny_spec()
    *others, last = spec.layers
    changed = replace(last, **{part: replace(getattr(last, part), **change)})
    assert served(replace(spec, layers=(*others, changed)))[-1] is False
    assert served(replace(spec, layers=(*others, replace(last, mlp_shares=Shares(added=0.5)))))[-1] is False
