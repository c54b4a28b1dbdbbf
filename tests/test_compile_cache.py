"""`jaxserve compile`, in a process of its own: a later start finds every program in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from jaxserve.compile_cache import use_compile_cache
from jaxserve.config import CompileConfig
from tests.goldens import cases
from tests.older_emitters import QUICK_FLAGS

ROOT = Path(__file__).parents[1]
OPTIONS = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 32}

COMPILE = """
    import sys
    from jaxserve import cli, startup

    def load_weights(*args, **kwargs):
        raise AssertionError("weights are read")

    startup.load_weights = load_weights
    sys.exit(cli.main(["compile", *sys.argv[1:]]))
"""
START = """
    import collections, json, sys
    import jax
    from jaxserve import LLM, SamplingParams

    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **details: events.update([event.rpartition("/")[2]]))
    model, options = sys.argv[1], json.loads(sys.argv[2])
    with LLM(model, skip_tokenizer_init=True, **options) as llm:
        params = SamplingParams(max_tokens=3, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 2, params, use_tqdm=False)
        assert all(output.finished for output in outputs)
        print(json.dumps(events))
"""


def run(program: str, *args: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *args],
        check=False,
        cwd=ROOT,
        env=own | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": QUICK_FLAGS, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_after_compile_a_start_compiles_nothing(tmp_path: Path) -> None:
    model, cache = cases.write_checkpoint(tmp_path / "model", "llama"), tmp_path / "cache"
    flags = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    output = run(COMPILE, str(model), "--compilation-cache-dir", str(cache), *flags)
    *table, total = output.splitlines()
    names = [line.split("│")[0].strip() for line in table if "│" in line]
    assert {"forward 32", "decode 1", "sample 1 shaped", "sample logprobs", "reset"} <= set(names)
    assert total.startswith(f"{len(names)} programs in ")

    events = json.loads(run(START, str(model), json.dumps(OPTIONS | {"compilation_cache_dir": str(cache)})))
    assert events["compile_requests_use_cache"] == events["cache_hits"] == len(names)
    assert "cache_misses" not in events

    for entry in cache.iterdir():
        if entry.name.endswith("-cache"):
            entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    events = json.loads(run(START, str(model), json.dumps(OPTIONS | {"compilation_cache_dir": str(cache)})))
    assert events["compile_requests_use_cache"] == len(names), "broken entries are compiled anew"
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    use_compile_cache(CompileConfig(compilation_cache_dir=str(tmp_path / "file" / "cache")))
    assert "compiled anew at each start" in caplog.text and jax.config.jax_compilation_cache_dir == before
