"""Every reference case through chunked prefill and paged decode: Hugging Face's logits, on one device and on several."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.loading import ModelDescription, describe_model, load_weights, open_source
from jaxserve.pallas_kernels import paged_attention as kernels
from jaxserve.sharding import Shardings, kv_repeat, make_mesh
from tests.goldens.cases import NAMES, read_golden, write_checkpoint
from tests.paged import paged_logits

pytestmark = pytest.mark.usefixtures("quickest_compiles")

LENGTH = 48  # tokens of each golden text
TOLERANCE = 0.01  # of the logits' standard deviation, in float32


@pytest.fixture(autouse=True)
def nan_where_attention_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's outputs for tokens not in use are unspecified, so they may be what a GPU's kernel leaves there."""
    attend = kernels.paged_attention

    def spoilt(q: jax.Array, *args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        out, pages = attend(q, *args, **options)
        in_use = args[3] < np.iinfo(np.int32).max  # write_slots
        return jnp.where(in_use[:, None, None], out, jnp.nan), pages

    monkeypatch.setattr(kernels, "paged_attention", spoilt)


@cache
def load(folder: Path, devices: int = 1, outputs_first: bool = False) -> tuple[ModelDescription, tuple]:
    source = open_source(str(folder))
    options = {"context": LENGTH, "outputs_first": outputs_first}
    model = describe_model(source, dtype=jnp.float32, kv_repeat=lambda heads: kv_repeat(heads, devices), **options)
    return model, load_weights(source, model, sharding_for=Shardings(make_mesh(devices)).of)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(got - want).max() / want.std()
    assert error < TOLERANCE, f"largest error is {error:.3%} of the logits' standard deviation"


# Slow ones of architectures that another case looks at too.
ALIKE = ("zamba2_plain", "granitemoe_swa", "cohere2_moe_rms", "granitemoehybrid_dense", "stablelm_parallel")
ALIKE += ("falcon_h1", "qwen2_window", "gemma3_linear", "deepseek_v2_groups", "phi3_longrope_past", "llama2")


# Some kinds of layer, for `make check`.
CHECKED = ("llama", "gemma2", "qwen3_moe", "deepseek_v2", "mamba2")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.extra] if name in ALIKE else [] if name in CHECKED else [pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_chunked_prefill_and_paged_decode(name: str, tmp_path: Path) -> None:
    """In one program for each kind of layer, which is what the time goes to: single tokens as they run beside a prefill."""
    model, weights = load(write_checkpoint(tmp_path / name, name))
    tokens, want = read_golden(name)
    for chunk, num_decoded in ((7, 16), (16, 0)):
        options: dict[str, Any] = {"chunk": chunk, "num_decoded": num_decoded, "decode_alone": False, "num_nobodys": 3}
        assert_close(paged_logits(model, weights, tokens, **options), want)


# Some kinds of layer; others are among DEVICES.
ALONE = ("mamba2", "qwen3_next", "minimax")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name if name in ALONE else pytest.param(name, marks=pytest.mark.extra) for name in NAMES])
def test_decode_alone(name: str, tmp_path: Path) -> None:
    """With weights as CPUs hold them."""
    model, weights = load(write_checkpoint(tmp_path / name, name), outputs_first=True)
    tokens, want = read_golden(name)
    assert_close(paged_logits(model, weights, tokens, chunk=16, num_decoded=16), want)


DEVICES = [
    ("llama", 4),  # heads cut and repeated
    *(("qwen2_moe", 2), ("deepseek_v2", 2)),  # experts cut
    ("falcon_h1_norm", 2),  # states cut
]
MORE_DEVICES = [
    *(("gemma3_text", 2), ("bloom", 2), ("gpt_oss", 2), ("rwkv", 2)),
    *(("olmo2", 4), ("doge", 2), ("falcon", 4), ("opt_post_norm", 2), ("llama4_text", 2), ("mixtral", 4), ("deepseek_v3", 4)),
    *(("zamba2", 2), ("qwen3_5_text", 2), ("recurrent_gemma", 2), ("kimi_linear", 2)),
    *(("gemma3n_text", 4), ("gemma4_moe", 2), ("mimo_v2_flash", 2)),
]
DEVICES += [pytest.param(*case, marks=pytest.mark.extra) for case in MORE_DEVICES]


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_kept_compiled")
@pytest.mark.parametrize("name, devices", DEVICES)
def test_tensor_parallel(name: str, devices: int, tmp_path: Path) -> None:
    model, weights = load(write_checkpoint(tmp_path / name, name), devices)
    tokens, want = read_golden(name)
    assert_close(paged_logits(model, weights, tokens, chunk=16, num_decoded=4, devices=devices), want)
