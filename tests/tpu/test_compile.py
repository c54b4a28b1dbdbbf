"""`jaxserve compile --target`, with the real compiler: what it says of a model, and how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve import cli
from tests.tpu.steps import write_config
from tests.tpu.test_target import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.usefixtures("no_compile_cache")]

Run = Callable[..., tuple[int, str]]

TINY = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, and what is printed."""
    for name, value in {"JAX_ENABLE_COMPILATION_CACHE": "true", "TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)  # the command line changes some of them

    def run(model: str, target: str, *options: str) -> tuple[int, str]:
        return cli.main(["compile", model, "--load-format", "dummy", "--target", target, *options]), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_weights_that_do_not_fit(run: Run, tmp_path: Path) -> None:
    status, out = run(write_config(tmp_path, "llama-3.1-70b"), "tpu:v5e:2x2", "--tensor-parallel-size", "4")
    assert status == 1
    assert re.match(
        r"does not fit on 4 of the 4 devices of tpu:v5e:2x2: the weights .* need 3\d\.\d GiB of 15\.8 GiB.* Raise ", out
    )


def test_a_pool_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    """Which only the compiler finds out."""
    status, out = run(write_config(tmp_path, **TINY), "tpu:v5e:2x2", "--num-gpu-blocks-override", "10000000")
    assert status == 1
    assert re.search(r"Ran out of memory on HBM.* \(1\.\d+T\).*15\.75G.* Lower .*--num-gpu-blocks-override", out)


@pytest.mark.tpu
def test_what_fits(run: Run, tmp_path: Path) -> None:
    """Every program with its seconds and memory, and the tokens that are left: the pool's bytes by those of a token."""
    sizes = ("--max-num-seqs", "16", "--max-num-batched-tokens", "64")
    status, out = run(write_config(tmp_path, **TINY), "tpu:v6e:2x2", "--tensor-parallel-size", "2", *sizes)
    rows = re.findall(r"^ (\w[\w ]*?) +┃? *[│|] +([\d.]+) [│|] +([\d,.]+) [│|] +([\d,.]+) [│|] +([\d.]+)%", out, re.MULTILINE)
    assert status == 0
    names = {name for name, *_ in rows}
    assert {"decode 16", "forward 64", "sample 16 shaped", "set_shaping", "copy_pages", "reset"} <= names
    assert f"{len(rows)} programs in " in out
    assert "compiled for 2 of the 4 devices of tpu:v6e:2x2; nothing has run. Of 31.2 GiB a device:" in out
    pool, tokens = re.search(r"([\d.]+) GiB for the pool\nfits: room for ([\d,]+) tokens", out).groups()
    per_token = 2 * 2 * 128 * 2 / 2 * TINY["num_hidden_layers"]  # keys and values of 2 heads over 2 devices
    assert float(pool) * 2**30 == pytest.approx(int(tokens.replace(",", "")) * per_token, rel=1e-3)
