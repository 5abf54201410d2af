"""The scheduler without torch, threads or clocks."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve_server.engine.scheduler import PATIENCE, Batch, Scheduler


@dataclass
class Plan:
    """Plan that adds one query after the other and records the rows that it receives."""

    lane: str
    queries: list[int]  # rows of each query
    max_per_batch: int | None = None
    cancelled_at: int | None = None
    fails_at: int | None = None
    started: int = 0  # number of queries that have been added to the scheduler
    received: list[tuple[int, int]] = field(default_factory=list)
    ended: str = ""

    def later_rows(self) -> int:
        return sum(self.queries[self.started :])


def add_query(scheduler: Scheduler[str], job: int, plan: Plan) -> None:
    rows = plan.queries[plan.started]
    plan.started += 1
    plan.received.clear()
    scheduler.add(job, plan.lane, rows, max_per_batch=plan.max_per_batch, later_rows=plan.later_rows())


def check(batch: Batch[str], size: int, plans: dict[int, Plan]) -> None:
    """Assert the properties of every batch."""
    assert 0 < sum(each.stop - each.start for each in batch.ranges) <= size
    assert len({each.job for each in batch.ranges}) == len(batch.ranges)
    for each in batch.ranges:
        plan = plans[each.job]
        assert not plan.ended, "no row may run for a plan that has ended"
        assert plan.lane == batch.lane
        assert each.stop - each.start <= (plan.max_per_batch or size)
        assert each.start == sum(stop - start for start, stop in plan.received), (
            "each row must run exactly once, in order"
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_thousand_plans_with_cancellations_and_failures(seed: int) -> None:
    rng = random.Random(seed)
    size = {"a": 8, "b": 3, "c": 1}
    plans = {
        job: Plan(
            lane=rng.choice("aabc"),
            queries=[int(rng.paretovariate(0.7)) % 300 + 1 for _ in range(rng.randint(1, 4))],
            max_per_batch=rng.choice([None, None, 1, 2]),
            cancelled_at=rng.randint(0, 4000) if rng.random() < 0.15 else None,
            fails_at=rng.randint(1, 50) if rng.random() < 0.1 else None,
        )
        for job in range(1000)
    }
    scheduler: Scheduler[str] = Scheduler(size.__getitem__)
    arrivals = list(plans)
    waited = dict.fromkeys(plans, 0)
    longest_wait = batches = 0
    while arrivals or len(scheduler):
        for _ in range(min(len(arrivals), rng.randint(0, 3))):
            job = arrivals.pop()
            add_query(scheduler, job, plans[job])
        for job, plan in plans.items():
            if plan.cancelled_at == batches and plan.started and not plan.ended:
                scheduler.remove(job)
                plan.ended = "cancelled"
        batch = scheduler.next_batch()
        batches += 1
        if batch is None:
            continue
        check(batch, size[batch.lane], plans)
        served = set()
        for each in batch.ranges:
            plan = plans[each.job]
            served.add(each.job)
            plan.received.append((each.start, each.stop))
            if plan.fails_at is not None and sum(e - s for s, e in plan.received) >= plan.fails_at:
                scheduler.remove(each.job)
                plan.ended = "failed"
            elif each.stop == plan.queries[plan.started - 1]:
                if plan.started == len(plan.queries):
                    plan.ended = "done"
                else:
                    add_query(scheduler, each.job, plan)
        for job, plan in plans.items():
            waiting = plan.started and not plan.ended and job not in served
            waited[job] = waited[job] + 1 if waiting else 0
        longest_wait = max(longest_wait, *waited.values())
    assert {plan.ended for plan in plans.values()} <= {"done", "cancelled", "failed"}, "every plan must end"
    for plan in plans.values():
        if plan.cancelled_at is None and plan.fails_at is None:
            assert plan.ended == "done"
    assert scheduler.rows_owed() == 0
    assert longest_wait < 1500, "no plan may wait for so many batches"


def test_short_plan_passes_a_long_plan() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 3000)
    scheduler.next_batch()
    scheduler.add(2, "forward", 1)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.ranges[0].job == 2
    assert sum(each.stop - each.start for each in batch.ranges) == 8, "the long plan fills the rest of the batch"


@pytest.mark.parametrize(("arrivals_in_ten", "least_share"), [(9, 0.099), (10, 0.02)])
def test_long_plan_is_not_starved_by_short_plans(arrivals_in_ten: int, least_share: float) -> None:
    """Plans of one row arrive in nine or ten of ten batches; the long plan still progresses."""
    scheduler: Scheduler[str] = Scheduler(lambda lane: 1)
    scheduler.add(0, "forward", 1024)
    gaps, last = [], 0
    for number in range(1, 1001):
        if number % 10 < arrivals_in_ten:
            scheduler.add(number, "forward", 1)
        batch = scheduler.next_batch()
        assert batch is not None
        if batch.ranges[0].job == 0:
            gaps.append(number - last)
            last = number
    assert len(gaps) / 1000 >= least_share
    backlog = len(scheduler)
    assert max(gaps) <= PATIENCE * 10 + backlog + 1, "after ten halvings 1,024 rows count as one row"


def test_two_long_plans_share_a_batch() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 100)
    scheduler.add(2, "forward", 3000)
    batch = scheduler.next_batch()
    assert batch is not None
    assert [(each.job, each.stop - each.start) for each in batch.ranges] == [(1, 4), (2, 4)]


def test_single_plan_gets_whole_batches() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 20)
    sizes = []
    while (batch := scheduler.next_batch()) is not None:
        sizes.append([each.stop - each.start for each in batch.ranges])
    assert sizes == [[8], [8], [4]]


def test_plan_with_a_large_weight_waits_but_does_not_starve() -> None:
    """Of two plans with equally many rows, the one with the smaller weight gets most of them."""
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 3000, weight=16.0)
    scheduler.add(2, "forward", 3000, weight=1 / 16)
    taken = {1: 0, 2: 0}
    for _ in range(200):
        batch = scheduler.next_batch()
        assert batch is not None
        for each in batch.ranges:
            taken[each.job] += each.stop - each.start
    assert sum(taken.values()) == 1600
    assert 20 <= taken[1] <= 80


def test_plan_with_a_small_weight_passes_a_shorter_plan() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 200)
    scheduler.add(2, "forward", 3000, weight=1 / 16)
    batch = scheduler.next_batch()
    assert batch is not None
    assert [(each.job, each.stop - each.start) for each in batch.ranges] == [(2, 8)]


def test_max_per_batch_limits_the_rows_of_a_plan() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 4)
    scheduler.add(1, "ascend", 3, max_per_batch=1)
    scheduler.add(2, "ascend", 3, max_per_batch=1)
    for step in range(3):
        batch = scheduler.next_batch()
        assert batch is not None
        assert sorted((t.job, t.start, t.stop) for t in batch.ranges) == [(1, step, step + 1), (2, step, step + 1)]
    assert scheduler.next_batch() is None


def test_rows_of_later_queries_count_for_the_order() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 1)
    scheduler.add(1, "forward", 1, later_rows=5000)
    scheduler.add(2, "forward", 10)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.ranges[0].job == 2
    assert scheduler.rows_owed() == 5010


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=1, max_size=20), st.integers(1, 16))
def test_every_row_is_in_exactly_one_batch(queries: list[tuple[int, int]], size: int) -> None:
    scheduler: Scheduler[int] = Scheduler(lambda lane: size)
    for job, (rows, max_per_batch) in enumerate(queries):
        scheduler.add(job, 0, rows, max_per_batch=max_per_batch)
    batched: dict[int, list[int]] = {job: [] for job in range(len(queries))}
    while (batch := scheduler.next_batch()) is not None:
        for each in batch.ranges:
            assert each.stop - each.start <= queries[each.job][1]
            batched[each.job] += range(each.start, each.stop)
    assert batched == {job: list(range(rows)) for job, (rows, _) in enumerate(queries)}


def test_import_of_the_scheduler_does_not_import_torch() -> None:
    code = "import sys, camserve_server.engine.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
