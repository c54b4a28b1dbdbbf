"""The decoder's own knobs, and what describing a model costs and says."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder, abstract_decoder
from jaxserve.models.description import describe_decoder
from jaxserve.models.interface import CacheSpec, Runtime
from jaxserve.models.spec import AttentionSpec, BorrowingAttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec, RopeSpec
from jaxserve.pallas_kernels.paged_attention import api
from tests.goldens import cases
from tests.models.forward import forward, logit_error, open_and_load, prompts_batch

MIXER = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, rope=RopeSpec(theta=1e4, rotary_dim=8))
MLP = MlpSpec(dim=24, activation="silu")
SPEC = DecoderSpec(
    vocab_size=32,
    d_model=16,
    layers=(LayerSpec(mixer=MIXER, mlp=MLP), LayerSpec(mixer=replace(MIXER, window=4), mlp=MLP)),
    norm=NormSpec(eps=1e-5),
    max_position=128,
)
TOKENS = np.random.default_rng(0).integers(0, 32, (1, 12))


def logits_of(**changes: Any) -> np.ndarray:
    model = describe_decoder("test", replace(SPEC, **changes), jnp.float32)
    weights = tuple(normal(p.path, p.abstract) for p in model.parameters)
    logits: np.ndarray = forward(model, weights, TOKENS)
    return logits


def normal(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """The same values for a parameter whatever others there are."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return jnp.asarray(rng.standard_normal(abstract.shape) * 0.3, abstract.dtype)


def test_logit_multiplier_and_softcap() -> None:
    plain = logits_of(layers=())
    np.testing.assert_allclose(logits_of(layers=(), logit_multiplier=0.5), plain * 0.5, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits_of(layers=(), logit_softcap=2.0), 2 * np.tanh(plain / 2), rtol=1e-4, atol=1e-5)


def test_a_residual_multiplier_of_zero_leaves_the_embeddings() -> None:
    one = SPEC.layers[:1]
    embedded = logits_of(layers=())
    np.testing.assert_allclose(logits_of(layers=one, residual_multiplier=0.0), embedded, rtol=1e-4, atol=1e-5)
    assert np.abs(logits_of(layers=one) - embedded).max() > 0.1


def test_embed_scale_is_rounded_to_the_dtype() -> None:
    """As Gemma was trained: sqrt(640) = 25.298 is 25.25 in bfloat16."""
    decoder = Decoder(replace(SPEC, embed_scale=640**0.5), jnp.bfloat16)
    decoder.embed.set_value(jnp.ones((32, 16), jnp.bfloat16))
    batch, _ = prompts_batch(TOKENS)
    assert set(np.asarray(decoder._embed(batch, Runtime("cpu")), np.float32).flat) == {25.25}


def test_description_says_what_apply_takes() -> None:
    model = describe_decoder("test", SPEC, jnp.bfloat16)
    shapes = {p.path: (p.abstract.shape, p.axes) for p in model.parameters}
    assert shapes["embed"] == ((32, 16), ("vocab", "embed"))
    assert shapes["layers.1.mixer.qkv"] == ((16, 2, 4, 8), ("embed", "kv_heads", None, None))
    assert shapes["layers.1.mixer.out"] == ((4, 8, 16), ("heads", None, "embed"))
    assert shapes["layers.0.mlp.up"] == ((16, 2, 24), ("embed", None, "ffn"))
    assert shapes["layers.0.mlp.down"] == ((24, 16), ("ffn", "embed"))
    assert shapes["lm_head"] == ((16, 32), ("embed", "vocab"))
    assert {a.dtype for a in model.abstract} == {jnp.dtype("bfloat16")}
    assert model.cache_specs == (CacheSpec("full", 2, 8), CacheSpec("sliding", 2, 8, 4))
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in model.abstract)


def test_parameters_are_in_the_order_of_the_states_leaves() -> None:
    """With ten layers and more, where the order of text and of numbers differ."""
    model = describe_decoder("test", replace(SPEC, layers=SPEC.layers * 6), jnp.float32)
    state = nnx.split(abstract_decoder(model.spec, jnp.float32))[1]
    paths = [".".join(str(getattr(k, "key", "")) for k in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [p.path for p in model.parameters]


def test_a_decoder_can_also_be_made_for_real() -> None:
    decoder = Decoder(SPEC, jnp.float32)
    assert decoder.embed.get_value().shape == (32, 16)


def test_kv_repeat() -> None:
    spec = SPEC.with_kv_repeat(lambda heads: 4 // heads)
    assert [c.num_kv_heads for c in describe_decoder("test", spec, jnp.float32).cache_specs] == [4, 4]
    with pytest.raises(ConfigError, match="each kv head serves 2 query heads, which do not divide over 4 devices"):
        SPEC.with_kv_repeat(lambda heads: 4)


def test_who_reads_another_layers_keys_must_see_as_far_back() -> None:
    def layers(kv_from: int, window: int | None) -> tuple[LayerSpec, ...]:
        reader = BorrowingAttentionSpec(**vars(replace(MIXER, window=window)), kv_from=kv_from)
        return (*SPEC.layers, LayerSpec(mixer=reader, mlp=MLP))

    model = describe_decoder("test", replace(SPEC, layers=layers(1, 4)), jnp.float32)
    assert model.cache_specs == (CacheSpec("full", 2, 8), CacheSpec("sliding", 2, 8, 4))
    for wrong in (layers(1, None), layers(0, 4), layers(2, 4)):
        with pytest.raises(ValueError, match="layer 2 cannot read the keys and values of layer"):
            replace(SPEC, layers=wrong)


@pytest.mark.parametrize("name", ["llama_bias", "qwen3", pytest.param("gemma3_text", marks=pytest.mark.extra)])
def test_rope_together_with_the_page_write_gives_the_same_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU's kernel does both, norms of q and k in front; here the kernel's reference does."""
    model, weights = open_and_load(cases.write_checkpoint(tmp_path, name))
    tokens, calls = np.arange(20)[None], []
    plain = forward(model, weights, tokens)
    rotate_qkv = api.reference.rotate_qkv
    monkeypatch.setattr(api.reference, "rotate_qkv", lambda *a, **o: calls.append(o) or rotate_qkv(*a, **o))
    monkeypatch.setattr(Runtime, "rotates_and_writes", True)
    traced_anew = Runtime("cpu", shares_pages=True)
    assert logit_error(forward(model, weights, tokens, runtime=traced_anew), plain) < 1e-4
    assert calls and all((call["eps"] > 0) == (name != "llama_bias") for call in calls)
