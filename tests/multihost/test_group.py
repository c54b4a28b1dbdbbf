"""`jaxserve serve` as several processes on this machine, each with a CPU device, joined by jax.distributed and gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from jaxserve import LLM, SamplingParams
from tests.goldens import cases
from tests.multihost.pairs import free_port
from tests.older_emitters import QUICK_FLAGS

ROOT = Path(__file__).parents[2]
LIMITS = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": 10**6}
PROMPT = list(range(3, 40))
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
SHAPED = {"seed": 5, "temperature": 1.0, "max_tokens": 12, "presence_penalty": 0.5, "logit_bias": {7: 1.0}, "ignore_eos": True}
START_S = 240  # loading and compiling on a busy machine
END_S = 10  # within which a group must have ended


class Group:
    """The processes of a group, what they print, and a client of process 0."""

    def __init__(self, folder: Path) -> None:
        self._coordinator = f"127.0.0.1:{free_port()}"
        self._model, self._folder = cases.write_checkpoint(folder / "model", "llama"), folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.client: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def start(self, process_id: int, num_processes: int, *more: str) -> subprocess.Popen[bytes]:
        options = {**LIMITS, "tensor_parallel_size": num_processes, "num_processes": num_processes, "process_id": process_id}
        options |= {"coordinator": self._coordinator, "port": 0, "compilation_cache_dir": "", "shutdown_timeout": 5}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        environment["XLA_FLAGS"] = QUICK_FLAGS
        command = [sys.executable, "-m", "jaxserve", "serve", str(self._model), "--skip-tokenizer-init", *flags, *more]
        with (self._folder / f"out{process_id}").open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def printed(self, process_id: int) -> str:
        return (self._folder / f"out{process_id}").read_text(errors="replace")

    def wait_until(self, text: str, process_id: int = 0) -> str:
        """The rest of the line of process_id's output that begins with the text."""
        for _ in range(START_S * 10):
            _, found, rest = self.printed(process_id).partition(text)
            if found and "\n" in rest:
                return rest.partition("\n")[0]
            assert all(process.poll() is None for process in self.processes), self.printed(0) + self.printed(1)
            time.sleep(0.1)
        raise AssertionError(self.printed(process_id))

    def tokens(self, **sampling: Any) -> list[int]:
        assert self.client is not None
        answer = self.client.post("/v1/completions", json={"prompt": PROMPT, "return_token_ids": True, **sampling})
        assert answer.status_code == 200, answer.text
        token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return token_ids

    def statuses(self) -> list[int]:
        """How the processes end, which they must do soon."""
        deadline = time.monotonic() + END_S
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


@contextmanager
def serving(folder: Path, num_processes: int) -> Iterator[Group]:
    with Group(folder) as group:
        group.processes += [group.start(i, num_processes) for i in range(num_processes)]
        with httpx.Client(base_url=group.wait_until("ready at "), timeout=60) as group.client:
            yield group


def alone(folder: Path) -> list[list[int]]:
    """The tokens of one process with one device."""
    with LLM(str(folder / "model"), skip_tokenizer_init=True, **LIMITS) as llm:
        params = [SamplingParams(**GREEDY), SamplingParams(**SHAPED)]
        outputs = [llm.generate([{"prompt_token_ids": PROMPT}], p, use_tqdm=False)[0] for p in params]
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.slow
def test_two_processes_are_as_one_and_a_killed_worker_ends_both(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as group:
        assert [group.tokens(**GREEDY), group.tokens(**SHAPED)] == alone(tmp_path)
        assert group.client is not None
        body = {"prompt": PROMPT, **GREEDY, "max_tokens": 200, "stream": True}
        with group.client.stream("POST", "/v1/completions", json=body) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            for _ in range(3):
                assert "error" not in json.loads(next(lines))
            group.processes[1].kill()
            *_, error, done = lines
        assert "process 1 of the group has gone" in json.loads(error)["error"]["message"] and done == "[DONE]"
        assert group.statuses() == [1, -signal.SIGKILL]
        assert re.search("error: the engine has stopped .*process 1 of the group has gone", group.printed(0))


@pytest.mark.tpu
def test_four_processes_are_as_one_and_a_killed_leader_ends_all(tmp_path: Path) -> None:
    with serving(tmp_path, 4) as group:
        assert [group.tokens(**GREEDY), group.tokens(**SHAPED)] == alone(tmp_path)
        group.processes[0].kill()
        leader, *others = group.statuses()
        assert leader == -signal.SIGKILL and all(status != 0 for status in others)
        # jax may find it first, and aborts
        texts = [group.printed(i) for i in (1, 2, 3)]
        assert all("process 0 of the group has gone" in text or "another task died" in text for text in texts)


@pytest.mark.extra
def test_a_refused_worker_and_a_stop(tmp_path: Path) -> None:
    """A worker with another config goes, another one comes, and SIGTERM to all of them lets a running request finish."""
    patient = "--shutdown-timeout=60"  # two busy cores may take longer than 5 seconds for a request
    with Group(tmp_path) as group:
        group.processes = [group.start(0, 2, patient)]
        wrong = group.start(1, 2, "--block-size=32")
        assert wrong.wait(120) == 2
        assert (
            "error: process 0 refuses process 1: it has another config: block_size 32 where process 0 has None"
            in group.printed(1)
        )
        group.processes.append(group.start(1, 2, patient))
        url = group.wait_until("ready at ")
        body = {"prompt": PROMPT, **GREEDY, "max_tokens": 200, "stream": True}
        with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            for process in group.processes:
                process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length" and done == "data: [DONE]"
        assert group.statuses() == [0, 0]
