"""A follower's devices hold what the leader's hold, whatever the requests were: here both are in one process, with a runner each."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxserve.engine import Engine
from jaxserve.errors import EngineDeadError
from jaxserve.multihost.leader import Leader
from jaxserve.multihost.leading_runner import LeadingRunner
from jaxserve.multihost.wire import Message
from jaxserve.multihost.worker import Worker
from jaxserve.runner import Runner
from jaxserve.sampling_params import SamplingParams
from jaxserve.weight_store import WeightStore
from tests.multihost.pairs import InThread, channels
from tests.tiny import run, tiny_engine

PROMPT = [int(i) for i in np.random.default_rng(1).integers(1, 90, 70)]


class Group:
    """An engine that leads, and the runner that follows it."""

    def __init__(self, **options: object) -> None:
        self.engine: Engine = tiny_engine(**options)
        own = self.engine.runner
        assert isinstance(own, Runner)
        mine, other = channels()
        self.leader, worker = Leader({1: mine}), Worker(other, 1)
        self.runner = LeadingRunner(self.leader, self.engine.weights, own.programs, own._inputs)
        self.engine.runner = self.engine._intake._runner = self.runner
        weights = WeightStore((), (), self.engine.weights.arrays)
        self.follower = Runner(weights, own.programs, own._inputs)
        self.following = InThread(worker.follow, self.follower)
        self.kinds: set[str] = set()
        broadcast = self.leader.broadcast
        self.leader.broadcast = lambda message: self.kinds.add(message.kind) or broadcast(message)  # type: ignore[method-assign, func-returns-value]

    def assert_alike(self) -> None:
        """Ends the group and compares all that stays on the devices between steps."""
        self.leader.end()
        self.following.result()
        for name in ("_state", "_last_tokens", "_shaping", "_packed"):
            pairs = zip(jax.tree.leaves(getattr(self.runner, name)), jax.tree.leaves(getattr(self.follower, name)), strict=True)
            for mine, theirs in pairs:
                np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_follower_holds_the_same(recurrent: bool) -> None:
    """Chunked prefill, forks and copies, shaping, beams, logprobs, preemption and an abort, side by side."""
    group = Group(recurrent=recurrent, num_pages=24, max_num_batched_tokens=32)
    plain = tiny_engine(recurrent=recurrent, num_pages=24, max_num_batched_tokens=32)
    texts = []
    for engine in (group.engine, plain):
        kept = [
            engine.add_request(PROMPT, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)),
            engine.add_request(PROMPT[:21], SamplingParams(n=3, seed=1, max_tokens=9, presence_penalty=0.7)),
            engine.add_request(PROMPT[:5], SamplingParams(temperature=0, max_tokens=8, logprobs=3, logit_bias={7: 2.0})),
            engine.add_request(PROMPT[5:19], SamplingParams(use_beam_search=True, n=2, temperature=0, max_tokens=6)),
        ]
        gone = engine.add_request(PROMPT[30:50], SamplingParams(seed=2, max_tokens=50))
        for _ in range(4):
            engine.step()
        engine.abort(gone)
        outputs = run(engine)
        texts.append([[(o.token_ids, o.logprobs) for o in outputs[name].outputs] for name in kept])
    assert texts[0] == texts[1]
    assert group.kinds == {"run", "copy", "shaping"}
    group.assert_alike()
    group.engine.shutdown()
    plain.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit; see conftest.py
def test_a_group_does_not_go_on_after_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.multihost.leading_runner.CAUSE_S", 0.01)
    group = Group()
    reasons: list[str] = []
    group.leader.on_failure(reasons.append)

    def fail(step: object) -> None:
        raise RuntimeError("the collective failed")

    monkeypatch.setattr(group.runner, "collect", fail)
    group.engine.add_request(PROMPT, SamplingParams(max_tokens=5))
    with pytest.raises(EngineDeadError, match="a step failed, which a group of processes cannot repeat; start the group again"):
        for _ in range(10):
            group.engine.step()
    assert reasons == ["a step failed, which a group of processes cannot repeat"]


def test_what_a_follower_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    group = Group()
    group.leader.broadcast(Message("dance"))
    with pytest.raises(Exception, match="process 0 says 'dance', which is unknown"):
        group.following.result()
    group.leader.end()
