"""Which models take sums that norm; that these give what others give is tests/pallas_kernels/test_collectives.py's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import summed_layers
from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.spec import DecoderSpec, Shares
from jaxserve.sharding import make_mesh
from tests.models.forward import prompts_batch
from tests.tiny import tiny_spec


def batch(**fields: Any) -> StepBatch:
    return replace(prompts_batch(np.zeros((1, 3), np.int64))[0], **fields)


def serves(spec: DecoderSpec, **fields: Any) -> bool:
    peers = {"peers": jnp.zeros((2, 3, 2), jnp.int32)}
    return summed_layers.serves(spec, batch(**peers | fields), Runtime("cpu", make_mesh(2), peer_sums=True))


def test_plain_layers_of_devices_that_add_up_are_served() -> None:
    assert serves(tiny_spec(window=8))
    assert serves(replace(tiny_spec(), embed_scale=2.0, logit_softcap=30.0, tie_embeddings=True))
    assert not serves(tiny_spec(), peers=None)


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
    assert not serves(replace(tiny_spec(), **change))


@pytest.mark.parametrize(
    "part, change",
    [
        ("mixer", {"out_bias": True}),
        ("mixer", {"num_heads": 3, "num_kv_heads": 3}),
        ("mlp", {"bias": True}),
        ("mlp", {"dim": 49}),
    ],
)
def test_layers_that_do_more_are_not_served(part: str, change: dict[str, Any]) -> None:
    spec = tiny_spec()
    *others, last = spec.layers
    changed = replace(last, **{part: replace(getattr(last, part), **change)})
    assert not serves(replace(spec, layers=(*others, changed)))
    assert not serves(replace(spec, layers=(*others, replace(last, mlp_shares=Shares(added=0.5)))))
    assert not serves(tiny_spec(recurrent=True))
