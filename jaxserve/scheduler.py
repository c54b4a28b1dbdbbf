"""Which tokens of which requests run in the next step, and in which pages and slots. Knows no model and no device.

Decodes go first, then prefill chunks, then admissions, under one token budget. A full pool preempts the last request
(it is computed again later; its tokens stay). Steps run in order on the device, so what is freed here is reusable at once,
even while a step that used it is still running.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from jaxserve.kv_pages import KvPages
from jaxserve.limits import Limits
from jaxserve.models.cache_layout import Reach
from jaxserve.page_keys import PromptKeys
from jaxserve.page_pool import PagePool
from jaxserve.page_table import PageTable
from jaxserve.prefix_cache import PrefixCache
from jaxserve.request import Request, Status
from jaxserve.slots import Slots
from jaxserve.step_plan import PlanRow, StepPlan

MAX_PASSED = 64  # admissions past a waiting request that does not fit, before the queue waits for it
MAX_LOOKED_AT = 32  # waiting requests that do not fit, before a step stops looking for one that does


class Scheduler:
    """Owns the waiting and running requests, their slots and their pages."""

    def __init__(
        self,
        limits: Limits,
        pool: PagePool,
        page_size: int,
        prefix_cache: PrefixCache | None = None,
        reaches: Sequence[Reach] = (Reach(),),
    ) -> None:
        """reaches: how far back the layers of each column of a page table read."""
        self.limits = limits
        self.pool = pool
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.pages = KvPages(pool, page_size, prefix_cache, reaches, limits.max_num_batched_tokens)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._slots = Slots(limits.max_num_seqs)
        self._prompt_keys = PromptKeys(page_size)

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    def add(self, request: Request) -> None:
        """Queues a request; the order among waiting ones is Request.order."""
        request.status = Status.WAITING
        insort(self.waiting, request, key=lambda r: r.order)

    def finish(self, request: Request, *, is_sound: bool = True) -> None:
        """Takes a request out, wherever it is, and frees what it holds; nobody finds it in the cache unless it is sound."""
        if not is_sound:
            self.pages.forget(request.table)
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._free(request)
        elif request.status is Status.WAITING and request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before results come back.

        Held requests wait for others: where those cannot run beside them, they give up their slots and pages.
        """
        forks = self._slots.take_forks()
        plan = self._plan()
        while not plan.num_rows and (victim := self._last_held()) is not None:
            self._preempt(victim)
            plan = self._plan()
        if not plan.num_rows:
            self._slots.put_back_forks(forks)
            return None
        plan.rows.sort(key=lambda row: row.num_tokens > 1)
        plan.forks = forks
        return plan

    def _last_held(self) -> Request | None:
        """The held request that gives way when nothing runs any more."""
        if any(r.num_in_flight for r in self.running + self.waiting):
            return None
        return max((r for r in self.running if r.is_held), key=lambda r: r.order, default=None)

    def _plan(self) -> StepPlan:
        plan = StepPlan()
        preemptions = self.num_preemptions
        wanted = [(r.num_to_compute, r) for r in self._plan_decodes(plan)]
        waiting = sum(len(r.token_ids) for r in self.waiting[: self.num_free_slots])  # prefix hits are not known yet
        demand = plan.num_tokens + sum(n for n, _ in wanted) + waiting
        plan.token_budget = self.limits.token_budget(plan.num_tokens + len(wanted), demand)
        single = [r for n, r in wanted if n == 1]
        room = plan.token_budget - plan.num_tokens - len(single)
        if demand > plan.token_budget == self.limits.max_num_batched_tokens and room >= self.limits.align:
            # In full steps alone: of a small one what is left free is more, and prompts have fewer tiles of attention to lose.
            plan.align = self.limits.align
            plan.token_budget -= room % plan.align  # for the rows of nobody's that the packer puts before the prompts
        order = single + [r for n, r in wanted if n > 1]
        for num_behind, request in zip(range(len(order) - 1, -1, -1), order, strict=True):
            self._continue(request, plan, num_behind)
        if self.num_preemptions == preemptions:
            self._admit(plan)
        if not plan.rows and not self.waiting:
            self._plan_ahead(plan)
        return plan

    def record_computed_pages(self, request: Request) -> None:
        """Offers the prefix cache the full pages whose tokens the host knows and whose keys a step has written."""
        if self.prefix_cache is None or request.status is not Status.RUNNING:
            return
        request.update_page_keys(self.page_size, self._prompt_keys)
        self.pages.record(request.table, request.page_keys[: request.num_computed // self.page_size])

    def recompute(self) -> None:
        """What the pages hold is no good any more: every running request is computed again, and the cache is emptied."""
        for request in list(self.running):
            self._preempt(request)
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def reset(self) -> None:
        """After a failed step: the state is lost, and so are the results that were on their way."""
        self.recompute()
        for request in self.waiting:
            request.num_in_flight = 0
        self._slots.forget_tables()

    def check_integrity(self) -> None:
        """Raises AssertionError where requests, slots and pages disagree."""
        self.pages.check_integrity(r.table for r in self.running)
        self._slots.check_integrity([r.slot for r in self.running])
        assert all(not r.table.columns for r in self.waiting), "a waiting request holds pages"

    # Running requests

    def _plan_decodes(self, plan: StepPlan) -> list[Request]:
        """Plans the next token of every request about which there is nothing to decide; returns the other running ones."""
        if len(self.running) > self.limits.max_num_batched_tokens:
            return self.running
        plan.decodes, others = self._go_on(self.running, plan)
        plan.num_tokens = plan.num_samples = len(plan.decodes)
        return others

    def _plan_ahead(self, plan: StepPlan) -> None:
        """Plans more tokens for those requests, where a program runs several steps and one of them is in all of these."""
        limits, requests = self.limits, plan.decodes
        if len(requests) > limits.repeated_rows or any(r.mode_rank > limits.repeated_mode_rank for r in requests):
            return
        num_more = limits.num_steps - 1
        if any(r.num_computed + num_more < r.max_num_tokens for r in requests):
            for _ in range(num_more):
                requests, _ = self._go_on(requests, plan)
                plan.ahead.append(requests)

    def _go_on(self, requests: list[Request], plan: StepPlan) -> tuple[list[Request], list[Request]]:
        """Plans the next token of each request about which there is nothing to decide; these, and the others."""
        going, others = [], []
        for request in requests:
            if request.num_computed < request.decodes_until or self._grow(request, plan):
                request.num_computed += 1
                request.num_in_flight += 1
                going.append(request)
            else:
                others.append(request)
        return going, others

    def _grow(self, request: Request, plan: StepPlan) -> bool:
        """Takes the page that a decoding request needs, if that is all it needs and there is one."""
        is_full = 0 < request.decodes_until == request.num_computed < request.max_num_tokens - 1
        if is_full:
            self._release_passed(request)
        num_updates = plan.num_page_updates + len(request.table.columns)
        if not is_full or num_updates > self.limits.max_page_updates or not self.pages.grow(request.table):
            return False
        request.decodes_until = min(request.num_computed + self.page_size, request.max_num_tokens - 1)
        plan.grown.append(request)
        plan.num_page_updates = num_updates
        return True

    def _continue(self, request: Request, plan: StepPlan, num_behind: int) -> None:
        """Plans a running request's next tokens; preempts others, or itself, where the pool is full."""
        wanted = self._chunk(request, plan, num_behind)
        if request.status is not Status.RUNNING or wanted <= 0:
            return
        self._release_passed(request)
        while not self._reserve(request, wanted, plan):
            victim = max(self.running, key=lambda r: (r.order, r.is_held))
            plan.drop(victim)
            self._preempt(victim)
            plan.page_copies = [copy for copy in plan.page_copies if self.pool.holders(copy[1])]
            if victim is request:
                return
        if plan.num_page_updates + request.table.num_unsent <= self.limits.max_page_updates:
            self._add_row(request, wanted, plan, num_behind)

    def _chunk(self, request: Request, plan: StepPlan, num_behind: int) -> int:
        """Tokens to compute now, given that each request behind may still want a row of logits."""
        wanted = min(request.num_to_compute, plan.token_budget - plan.num_tokens)
        if request.wants_prompt_logprobs:
            wanted = min(wanted, self.limits.max_num_seqs - plan.num_samples - num_behind)
        over = (request.num_computed + wanted) % plan.align
        return wanted - over if over < wanted < request.num_to_compute else wanted

    def _reserve(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Gets the pages for the request's next tokens, all or none; what it shares and will write is to be copied."""
        start, known = request.num_computed, len(request.token_ids)
        return self.pages.reserve(request.table, start, start + num_tokens, known, plan.page_copies)

    def _preempt(self, request: Request) -> None:
        self.record_computed_pages(request)  # when it comes back, it may find them
        self.running.remove(request)
        self._free(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.add(request)

    def _free(self, request: Request) -> None:
        self._slots.give_back(request.slot, request.table)
        self.pages.free(request.table)
        request.table = PageTable()
        request.num_computed = request.decodes_until = 0
        request.slot = -1
        request.is_placed = False

    def _release_passed(self, request: Request) -> None:
        """Frees the pages that no layer will read any more."""
        if self.pages.has_passed(request.table, request.num_computed):
            self.record_computed_pages(request)
            self.pages.release_passed(request.table, request.num_computed)

    def _add_row(self, request: Request, num_tokens: int, plan: StepPlan, num_behind: int = 0) -> None:
        start = request.num_computed
        num_targets = 0
        if request.wants_prompt_logprobs:
            num_targets = min(start + num_tokens, request.num_prompt_tokens - 1) - start
        plan.num_page_updates += request.table.num_unsent
        row = PlanRow(request, start, num_tokens, [], request.table.send(), num_targets)
        if not request.is_placed:
            plan.place(request)
        plan.rows.append(row)
        plan.num_tokens += num_tokens
        plan.num_samples += num_targets
        request.num_computed += num_tokens
        if request.num_computed == request.num_tokens:
            plan.sample(row, request)
            if not request.needs_host:
                request.decodes_until = min(request.table.num_pages * self.page_size, request.max_num_tokens - 1)
            if request.group.unforked:
                self._fork_group(row, plan, num_behind)

    # Forks

    def fork(self, parent: Request, child: Request) -> None:
        """Starts a child that shares all of a running parent's pages; needs a free slot."""
        child.table = parent.table.forked()
        self.pages.share(child.table)
        parent.decodes_until = 0  # the page it writes next is to be copied
        child.num_computed = parent.num_computed
        child.num_cached_tokens = parent.num_cached_tokens
        child.page_keys = list(parent.page_keys)
        child.scheduled_s = parent.scheduled_s
        self._run(child)
        self._slots.fork(parent.slot, child.slot)

    def _fork_group(self, row: PlanRow, plan: StepPlan, num_behind: int) -> None:
        """A prompt that is computed to its end gives a first token to the request's siblings as well."""
        siblings, row.request.group.unforked = row.request.group.unforked, []
        for sibling in siblings:
            if self.num_free_slots and plan.num_samples + num_behind < self.limits.max_num_seqs:
                self.fork(row.request, sibling)
                plan.place(sibling)
                plan.sample(row, sibling)
            else:
                self.add(sibling)

    def _run(self, request: Request) -> None:
        self.running.append(request)
        request.status = Status.RUNNING
        request.slot = self._slots.take(request.table)

    # Admission

    def _admit(self, plan: StepPlan) -> None:
        """Starts waiting requests in order. One that does not fit is passed by smaller ones, but not for ever."""
        passed: list[Request] = []
        position = 0  # among the waiting ones; those that start leave it
        while position < len(self.waiting) and len(passed) < MAX_LOOKED_AT:
            if not self.num_free_slots or plan.num_samples >= self.limits.max_num_seqs:
                break
            if plan.token_budget - plan.num_tokens < plan.align:
                break
            request = self.waiting[position]
            if request.is_held:
                position += 1
                continue
            table = None if request.num_in_flight else self._fitting_table(request, plan)
            if table is None:
                if request.num_passed >= MAX_PASSED:
                    break
                passed.append(request)
                position += 1
                continue
            self._start(request, table, plan)
            for skipped in passed:
                skipped.num_passed += 1

    def _fitting_table(self, request: Request, plan: StepPlan) -> PageTable | None:
        """What is cached of the request, if all pages of its known tokens, and of one more, can be had now."""
        num_tokens = len(request.token_ids) + 1
        if plan.num_page_updates + self.pages.max_pages(num_tokens) > self.limits.max_page_updates:
            return None
        table = self._find_prefix(request)
        return table if self.pages.can_start(table, num_tokens) else None

    def _find_prefix(self, request: Request) -> PageTable:
        if self.prefix_cache is None or request.wants_prompt_logprobs:
            return self.pages.find(())
        request.update_page_keys(self.page_size, self._prompt_keys)
        # The last token is always computed: its logits are wanted.
        return self.pages.find(request.page_keys[: (len(request.token_ids) - 1) // self.page_size])

    def _start(self, request: Request, table: PageTable, plan: StepPlan) -> None:
        request.table = table
        self.pages.share(table)
        request.num_computed = request.table.num_cached * self.page_size
        if self.prefix_cache is not None and request.num_preemptions == 0:
            self.prefix_cache.queries += request.num_prompt_tokens
            self.prefix_cache.hits += request.num_computed
            request.num_cached_tokens = request.num_computed
        num_tokens = self._chunk(request, plan, num_behind=0)
        reserved = self._reserve(request, num_tokens, plan)
        assert reserved, "_fitting_table has counted the pages"
        self.waiting.remove(request)
        self._run(request)
        self._add_row(request, num_tokens, plan)
        # Whoever starts behind it, in this very step, may read what it writes: in each layer, its rows are written by then.
        self.record_computed_pages(request)
