"""The scheduler alone: no model, and tokens as the test likes."""

from __future__ import annotations

from jaxserve.limits import Limits
from jaxserve.page_pool import PagePool
from jaxserve.request import Request, RequestGroup, Status
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler

PAGE_SIZE = 4


def request_of(order: int) -> Request:
    """Has a prompt of one page and a half; the larger its order, the sooner it is preempted."""
    group = RequestGroup(f"r{order}", list(range(6)), SamplingParams(), max_output_tokens=8, stop_ids=frozenset())
    return Request(group, 0, 0, (0, order))


def running(num_pages: int, *orders: int, num_steps: int = 1) -> tuple[Scheduler, list[Request]]:
    """Requests that have computed their prompts and have a token to compute."""
    limits = Limits(8, max_num_batched_tokens=32, max_page_updates=64, num_steps=num_steps, repeated_rows=2, repeated_mode_rank=1)
    scheduler = Scheduler(limits, PagePool(num_pages), PAGE_SIZE)
    requests = [request_of(order) for order in orders]
    for request in requests:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None and len(plan.rows) == len(orders)
    for request in requests:
        request.num_in_flight = 0
        request.token_ids.append(9)
    return scheduler, requests


def fork(scheduler: Scheduler, parent: Request, order: int) -> Request:
    child = request_of(order)
    child.token_ids = list(parent.token_ids)
    scheduler.fork(parent, child)
    return child


def test_the_copy_of_a_preempted_request_is_forgotten() -> None:
    """Its page is the next request's copy by then, and two copies into one page would mix them."""
    scheduler, (first, last) = running(5, 4, 9)
    scheduler.running.reverse()  # the one that will be preempted takes the last free page, for its copy
    fork(scheduler, last, 3)
    fork(scheduler, first, 2)
    shared = first.table.columns[0].pages[1]
    plan = scheduler.schedule()
    assert plan is not None
    assert last.status is Status.WAITING and not last.table.columns
    assert [source for source, _ in plan.page_copies] == [shared]
    assert len(plan.rows) == plan.num_tokens == plan.num_samples == 3
    assert plan.num_page_updates == sum(len(entries) for r in plan.rows for entries in r.new_entries)
    scheduler.check_integrity()


def test_held_requests_give_way_when_nothing_else_can_run() -> None:
    """Two fill the pool, and both wait for a third's token, which has no page."""
    scheduler, (first, last) = running(4, 1, 2)
    first.is_held = last.is_held = True
    first.decodes_until = last.decodes_until = 0  # the host must choose their next token
    waiting = request_of(3)
    scheduler.add(waiting)
    last.num_in_flight = 1
    assert scheduler.schedule() is None  # what comes back may change things
    last.num_in_flight = 0
    plan = scheduler.schedule()
    assert plan is not None and [row.request for row in plan.rows] == [waiting]
    assert (first.status, last.status) == (Status.RUNNING, Status.WAITING)  # one was enough
    scheduler.check_integrity()


def test_a_slot_keeps_its_table() -> None:
    """A fork into the slot of a request with the same beginning sends only the pages that differ."""
    scheduler, (parent, _) = running(8, 1, 2)
    sibling = fork(scheduler, parent, 3)
    plan = scheduler.schedule()
    assert plan is not None
    row = next(row for row in plan.rows if row.request is sibling)
    assert [entries.start for entries in row.new_entries] == [0]  # nothing is known of a fresh slot
    scheduler.finish(sibling)
    assert fork(scheduler, parent, 4).table.columns[0].num_sent == 1
    scheduler.reset()
    assert scheduler.schedule() is not None
    assert fork(scheduler, parent, 5).table.columns[0].num_sent == 0


def test_a_step_is_cut_to_a_program_that_it_fills() -> None:
    limits = Limits(8, max_num_batched_tokens=8192, max_page_updates=64, token_sizes=(512, 2048, 8192))
    assert limits.token_budget(256, 500) == 512
    assert limits.token_budget(256, 556) == 512, "2,048 would be three quarters padding"
    assert limits.token_budget(256, 1600) == 2048
    assert limits.token_budget(256, 1500) == 512, "more than a quarter of 2,048 would be padding"
    assert limits.token_budget(256, 4000) == 2048
    assert limits.token_budget(513, 556) == 2048, "what must run does not fit the smaller one"
    assert limits.token_budget(1, 100_000) == 8192
    assert limits.token_budget(0, 3) == 512
    assert Limits(8, 32, 64).token_budget(1, 20) == 32


def test_what_a_step_leaves_over_runs_in_the_next() -> None:
    limits = Limits(8, max_num_batched_tokens=64, max_page_updates=64, token_sizes=(16, 64))
    scheduler = Scheduler(limits, PagePool(64), PAGE_SIZE)
    group = RequestGroup("long", list(range(20)), SamplingParams(), max_output_tokens=8, stop_ids=frozenset())
    request = Request(group, 0, 0, (0, 0))
    scheduler.add(request)
    sizes = []
    while request.num_computed < 20:
        plan = scheduler.schedule()
        assert plan is not None
        sizes.append(plan.num_tokens)
    assert sizes == [16, 4]


def test_several_steps_are_planned_at_once() -> None:
    """Each request is in as many as it has tokens left, and what pages it needs in all of them come with the first."""
    scheduler, (long, short) = running(12, 1, 2, num_steps=4)
    short.max_num_tokens, short.decodes_until = 9, 8
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.decodes, plan.ahead) == ([long, short], [[long, short], [long], [long]])
    assert (long.num_computed, long.num_in_flight) == (10, 4)
    assert (short.num_computed, short.num_in_flight) == (8, 2)
    assert (plan.grown, plan.num_page_updates, long.table.num_pages) == ([long], 1, 3)
    assert (plan.places(plan.ahead[0]), plan.places(plan.ahead[1])) == (slice(2), [0])
    scheduler.check_integrity()


def test_a_request_without_a_page_stays_behind() -> None:
    scheduler, (first, last) = running(5, 1, 2, num_steps=4)
    plan = scheduler.schedule()
    assert plan is not None and plan.ahead == [[first, last], [first], [first]]
    scheduler.check_integrity()


def test_steps_are_planned_one_by_one_where_something_is_to_be_decided() -> None:
    """A request waits, or wants more than programs of several steps can do, none is in all of the steps, or they are too many."""
    for case in ("waits", "shaped", "ends", "many", "runs"):
        scheduler, requests = running(*(9, 1, 2, 3) if case == "many" else (6, 1, 2), num_steps=4)
        if case == "waits":
            scheduler.add(request_of(3))
            scheduler.pool.allocate()  # of the two pages that it needs one is left
        if case == "shaped":
            requests[1].mode_rank = 2
        if case == "ends":
            for request in requests:
                request.max_num_tokens = 9
        plan = scheduler.schedule()
        assert plan is not None and plan.decodes == requests
        assert len(plan.ahead) == (3 if case == "runs" else 0), case


def chunks(limits: Limits, lengths: list[int], num_steps: int) -> list[list[int]]:
    """Tokens of each row, of steps in which every request goes on as soon as it can."""
    scheduler = Scheduler(limits, PagePool(400), PAGE_SIZE)
    for order, length in enumerate(lengths):
        group = RequestGroup(f"r{order}", list(range(length)), SamplingParams(), max_output_tokens=50, stop_ids=frozenset())
        scheduler.add(Request(group, 0, 0, (0, order)))
    steps = []
    for _ in range(num_steps):
        plan = scheduler.schedule()
        assert plan is not None and plan.num_tokens <= limits.max_num_batched_tokens
        steps.append([1] * len(plan.decodes) + [row.num_tokens for row in plan.rows])
        scheduler.check_integrity()
    return steps


def test_a_chunk_of_a_full_step_ends_where_a_tile_may_begin() -> None:
    """And there is room for the longer rows to begin at one."""
    limits = Limits(20, max_num_batched_tokens=64, max_page_updates=400, token_sizes=(24, 64), align=8)
    assert chunks(limits, [3, 5, 100, 40, 60, 24], 5) == [
        [3, 5, 56],
        [1, 1, 44, 8],  # 56 tokens behind two and a gap of six, of which the first prompt leaves 12
        [1, 1, 1, 32, 24],
        [1, 1, 1, 1, 36, 24],  # nothing is left over, so nothing is cut
        [1] * 6,
    ]


def test_a_step_that_is_not_full_or_small_is_not_cut_for_tiles() -> None:
    limits = Limits(20, max_num_batched_tokens=64, max_page_updates=400, token_sizes=(24, 64), align=8)
    assert chunks(limits, [3, 5, 53], 2) == [[3, 5, 53], [1, 1, 1]]
    assert chunks(limits, [3, 29], 3) == [[3, 21], [1, 8], [1, 1]]


def test_a_budget_below_a_tiles_alignment_is_used() -> None:
    limits = Limits(4, max_num_batched_tokens=6, max_page_updates=400, align=8)
    assert chunks(limits, [1, 20], 6) == [[1, 5], [1, 5], [1, 5], [1, 5], [1, 1], [1, 1]]
