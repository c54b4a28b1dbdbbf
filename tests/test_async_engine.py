"""AsyncEngine: streams, limits on what is taken in, one request's trouble, the engine's death."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from jaxserve.async_engine import AsyncEngine, RequestStream
from jaxserve.engine import Engine
from jaxserve.errors import EngineDeadError, InvalidRequestError, QueueFullError, WeightsError
from jaxserve.outputs import RequestOutput
from jaxserve.replicas import Replicas
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.tiny import assert_greedy, greedy, tiny_engine, with_limits


class Gate:
    """Lets an engine's steps through one by one, or all."""

    def __init__(self, engine: Engine) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.at_gate = threading.Event()
        self._step, engine.step = engine.step, self._pass  # type: ignore[method-assign]

    def _pass(self) -> list[RequestOutput]:
        if not self._is_open:
            self.at_gate.set()
            assert self._permits.acquire(timeout=20)
        return self._step()

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._is_open = True
        self._permits.release()


@pytest.fixture
def engine() -> Engine:
    return tiny_engine()


@asynccontextmanager
async def started(engine: Engine | Replicas) -> AsyncIterator[AsyncEngine]:
    served = AsyncEngine(engine)
    served.start()
    try:
        yield served
    finally:
        await asyncio.to_thread(served.shutdown)


async def last(stream: RequestStream) -> RequestOutput:
    async with asyncio.timeout(20):
        return [output async for output in stream][-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Any) -> None:
    asyncio.run(test)


def test_streams_give_the_oracles_tokens(engine: Engine) -> None:
    async def test() -> None:
        async with started(engine) as served:
            params = SamplingParams(temperature=0, max_tokens=10, output_kind=OutputKind.DELTA)
            streams = [served.submit([i, 2, 3], params) for i in range(5)]
            for i, stream in enumerate(streams):
                tokens = [t async for output in stream for t in output.outputs[0].token_ids]
                assert len(tokens) == 10
                assert_greedy([i, 2, 3], tokens)

    run(test())


def test_replicas_behind_one_front() -> None:
    engines = [with_limits(tiny_engine(), max_num_queued_tokens=6, max_num_queued_reqs=20) for _ in range(2)]

    async def test() -> None:
        async with started(Replicas(engines)) as served:
            streams = []
            while len(streams) < 20:
                try:
                    streams.append((len(streams), served.submit([len(streams), 2, 3], greedy(10))))
                except QueueFullError:  # until the prompts before it are computed, whichever replica does
                    await asyncio.sleep(0.005)
            for i, stream in streams:
                assert_greedy([i, 2, 3], (await last(stream)).outputs[0].token_ids)
            assert not served._admission._samples and not served._admission._waiting_tokens

    run(test())


def test_full_queue_over_submissions_from_many_threads(engine: Engine) -> None:
    """The limit holds exactly, though the engine has taken in only the first of them."""
    with_limits(engine, max_num_queued_reqs=7)
    gate = Gate(engine)
    taken: list[str] = []
    refused: list[str] = []

    async def client(served: AsyncEngine, barrier: threading.Barrier) -> None:
        barrier.wait()
        streams = []
        for _ in range(10):
            try:
                streams.append(served.submit([1, 2], greedy(3)))
            except QueueFullError as e:
                refused.append(str(e))
        taken.extend([stream.request_id for stream in streams])
        while len(taken) + len(refused) < 40:
            await asyncio.sleep(0.005)
        gate.open()
        for stream in streams:
            assert (await last(stream)).outputs[0].finish_reason == "length"

    async def test() -> None:
        async with started(engine) as served:
            barrier = threading.Barrier(4)
            await asyncio.gather(*[asyncio.to_thread(asyncio.run, client(served, barrier)) for _ in range(4)])
            assert len(taken) == 7 and len(refused) == 33
            assert refused[0] == "7 requests are in flight, and the server takes 7; try again later"
            assert (await last(served.submit([1], greedy(2)))).finished

    run(test())


def test_each_sample_counts_and_an_idle_server_takes_any(engine: Engine) -> None:
    with_limits(engine, max_num_queued_reqs=3)
    gate = Gate(engine)

    async def test() -> None:
        async with started(engine) as served:
            many = served.submit([1, 2], greedy(3, n=4))
            with pytest.raises(QueueFullError):
                served.submit([1, 2], greedy(3))
            many.abort()
            two = served.submit([1, 2], greedy(3, n=2))
            with pytest.raises(QueueFullError):
                served.submit([1, 2], greedy(3, n=2))
            one = served.submit([1, 2], greedy(3))
            gate.open()
            assert (await last(two)).finished and (await last(one)).finished

    run(test())


def test_prompt_tokens_wait_until_the_first_token(engine: Engine) -> None:
    """Whether or not the client sees that token before the end."""
    with_limits(engine, max_num_queued_tokens=50)
    gate = Gate(engine)

    async def test() -> None:
        async with started(engine) as served:
            first = served.submit([1] * 30, greedy(40))
            second = served.submit([2] * 30, greedy(40))
            with pytest.raises(QueueFullError, match="60 prompt tokens wait, and the server takes 50"):
                served.submit([3], greedy(40))
            await asyncio.to_thread(gate.at_gate.wait, 20)
            gate.allow(3)  # none of them ends in so few
            await until(lambda: not served._admission._waiting_tokens)
            third = served.submit([3] * 200, greedy(2))
            assert len(served._streams) == 3
            gate.open()
            assert all([(await last(stream)).finished for stream in (first, second, third)])

    run(test())


def test_offline_use_has_no_limit(engine: Engine) -> None:
    with_limits(engine, max_num_queued_reqs=1, max_num_queued_tokens=1)
    for _ in range(5):
        engine.add_request([1, 2, 3], greedy(2))


def test_priority_reaches_the_engine() -> None:
    engine = tiny_engine(max_num_seqs=1, scheduling_policy="priority")
    gate = Gate(engine)
    ended: list[int] = []

    async def follow(priority: int, stream: RequestStream) -> None:
        await last(stream)
        ended.append(priority)

    async def test() -> None:
        async with started(engine) as served:
            first = served.submit([9], greedy(2), priority=9)
            await asyncio.to_thread(gate.at_gate.wait, 20)
            streams = [(p, served.submit([p], greedy(2), priority=p)) for p in (5, 1, 3)]
            gate.open()
            await asyncio.gather(last(first), *[follow(p, stream) for p, stream in streams])
            assert ended == [1, 3, 5]

    run(test())


def test_an_id_in_use_is_refused_before_the_engine_knows_it(engine: Engine) -> None:
    gate = Gate(engine)

    async def test() -> None:
        async with started(engine) as served:
            stream = served.submit([1], greedy(2), request_id="a")
            with pytest.raises(InvalidRequestError, match="'a' is in use"):
                served.submit([1], greedy(2), request_id="a")
            stream.abort()
            again = served.submit([1], greedy(2), request_id="a")
            gate.open()
            assert (await last(again)).finished

    run(test())


def test_a_request_that_cannot_be_taken_in_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_request = engine.add_request

    def add(token_ids: list[int], *args: Any, **kwargs: Any) -> str:
        if token_ids == [13]:
            raise RuntimeError("injected")
        return add_request(token_ids, *args, **kwargs)

    monkeypatch.setattr(engine, "add_request", add)

    async def test() -> None:
        async with started(engine) as served:
            good, bad = served.submit([1], greedy(3)), served.submit([13], greedy(3))
            assert (await last(bad)).error == "internal error; the log has the details"
            assert (await last(good)).error is None
            assert served.is_healthy

    run(test())


@pytest.fixture(params=["says what it has", "cannot even say that"])
def dying(request: pytest.FixtureRequest, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes the next step raise; the engine may then be unable to end its requests."""

    def fail(*_: object) -> Any:
        raise RuntimeError("injected")

    def die() -> None:
        monkeypatch.setattr(engine.scheduler, "schedule", fail)
        if request.param == "cannot even say that":
            monkeypatch.setattr(engine, "fail_all", fail)

    yield die


def test_a_dead_engine_ends_every_stream(engine: Engine, dying: Callable[[], None]) -> None:
    """Those that run, those that wait, and those that the engine has not taken in."""
    gate = Gate(engine)

    async def test() -> None:
        async with started(engine) as served:
            streams = [served.submit([i], greedy(50)) for i in range(6)]
            await asyncio.to_thread(gate.at_gate.wait, 20)
            gate.allow(4)
            await until(lambda: gate._permits._value == 0)
            streams += [served.submit([i], greedy(50)) for i in range(3)]
            dying()
            gate.open()
            for stream in streams:
                assert "injected" in ((await last(stream)).error or "")
            assert not served.is_healthy and not served._streams
            with pytest.raises(EngineDeadError, match="the engine has stopped: .*injected. Restart the server"):
                served.submit([1], greedy(2))

    run(test())


def test_no_submission_falls_between_health_and_death(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that submit while the engine dies get an error at once, or a stream that ends with one."""
    steps = iter(range(10**6))

    def schedule() -> None:
        if next(steps) > 20:
            raise RuntimeError("injected")

    monkeypatch.setattr(engine.scheduler, "schedule", schedule)
    refused = 0

    async def client(served: AsyncEngine) -> None:
        nonlocal refused
        streams = []
        while True:
            try:
                streams.append(served.submit([1, 2], greedy(5)))
            except EngineDeadError:
                refused += 1
                break
            await asyncio.sleep(0.001)
        for stream in streams:
            assert "injected" in ((await last(stream)).error or "")

    async def test() -> None:
        async with started(engine) as served:
            await asyncio.gather(*[asyncio.to_thread(asyncio.run, client(served)) for _ in range(3)])
            assert refused == 3

    run(test())


def test_submissions_without_end_do_not_stop_the_steps(engine: Engine) -> None:
    async def test() -> None:
        async with started(engine) as served:

            def again() -> None:
                if not stop.is_set():
                    served._calls.append(again)

            stop = threading.Event()
            served._calls.append(again)
            assert (await last(served.submit([1], greedy(5)))).error is None
            stop.set()

    run(test())


def test_shutdown_ends_streams(engine: Engine) -> None:
    gate = Gate(engine)

    async def test() -> None:
        async with started(engine) as served:
            stream = served.submit([1], greedy(200))
            await asyncio.to_thread(gate.at_gate.wait, 20)
            stopping = asyncio.create_task(asyncio.to_thread(served.shutdown))
            await until(lambda: served._stopping)
            gate.open()
            await stopping
            assert (await last(stream)).error == "the engine is shut down"

    run(test())


def test_a_client_whose_loop_is_gone_does_no_harm(engine: Engine) -> None:
    gate = Gate(engine)
    served = AsyncEngine(engine)
    served.start()

    async def submit() -> None:
        served.submit([1], greedy(5))

    run(submit())
    gate.open()

    async def other() -> None:
        assert (await last(served.submit([2], greedy(5)))).error is None

    run(other())
    served.shutdown()


def test_an_engine_that_hangs_is_given_up(engine: Engine) -> None:
    """Nothing that its thread holds is needed to end the streams."""
    gate = Gate(engine)

    async def test() -> None:
        served = AsyncEngine(engine)
        served.start()
        thread = served._thread
        assert thread is not None and served.stalled_s == 0
        streams = [served.submit([i], greedy(3)) for i in range(3)]
        await until(gate.at_gate.is_set)
        await until(lambda: served.stalled_s > 0.05)
        served.give_up("a step has not ended")
        assert not served.is_healthy
        for stream in streams:
            assert (await last(stream)).error == "a step has not ended"
        with pytest.raises(EngineDeadError, match="a step has not ended"):
            served.submit([1], greedy(3))
        served.shutdown()  # does not wait for the thread
        gate.open()
        await asyncio.to_thread(thread.join)

    run(test())


def test_time_without_work_is_no_stall(engine: Engine) -> None:
    async def test() -> None:
        async with started(engine) as served:
            await last(served.submit([1], greedy(3)))
            await until(lambda: served.stalled_s == 0)
            await asyncio.sleep(0.1)
            assert served.stalled_s == 0 and served.is_healthy

    run(test())


def test_weights_are_swapped_while_requests_run(engine: Engine) -> None:
    async def test() -> None:
        tree = {name: x * 0.5 for name, x in engine.params.items()}
        gate = Gate(engine)
        async with started(engine) as served:
            stream = served.submit([1, 2, 3], greedy(30))
            await asyncio.to_thread(gate.at_gate.wait)
            update = asyncio.create_task(served.update_params(tree))
            gate.open()
            assert await update == 1
            output = await last(stream)
            assert output.error is None and output.weight_version == 1
            assert output.outputs[0].token_ids
            with pytest.raises(WeightsError):
                await served.update_params({})
            assert (await last(served.submit([1, 2, 3], greedy(3)))).weight_version == 1
        with pytest.raises(EngineDeadError, match="shut down"):
            await served.update_params(tree)

    run(test())


def test_an_engine_that_dies_leaves_no_update_waiting(engine: Engine) -> None:
    async def test() -> None:
        gate = Gate(engine)
        async with started(engine) as served:
            stream = served.submit([1, 2, 3], greedy(30))
            await asyncio.to_thread(gate.at_gate.wait)
            update = asyncio.create_task(served.update_params(engine.params))
            await asyncio.sleep(0)
            served.give_up("it hangs")
            with pytest.raises(EngineDeadError, match="it hangs"):
                await update
            assert (await last(stream)).error == "it hangs"
            gate.open()

    run(test())
