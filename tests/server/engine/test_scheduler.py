"""The scheduler alone: no torch, no thread, no clock."""

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
    """Asks one question after the other; counts what it is given."""

    lane: str
    questions: list[int]
    width: int | None = None
    cancelled_at: int | None = None
    fails_at: int | None = None
    asked: int = 0
    got: list[tuple[int, int]] = field(default_factory=list)
    ended: str = ""

    def later(self) -> int:
        return sum(self.questions[self.asked :])


def ask(scheduler: Scheduler[str], job: int, plan: Plan) -> None:
    rows = plan.questions[plan.asked]
    plan.asked += 1
    plan.got.clear()
    scheduler.add(job, plan.lane, rows, max_per_batch=plan.width, later_rows=plan.later())


def check(batch: Batch[str], size: int, plans: dict[int, Plan]) -> None:
    """What every batch must keep to."""
    assert 0 < sum(take.stop - take.start for take in batch.ranges) <= size
    assert len({take.job for take in batch.ranges}) == len(batch.ranges)
    for take in batch.ranges:
        plan = plans[take.job]
        assert not plan.ended, "a row was spent on the dead"
        assert plan.lane == batch.lane
        assert take.stop - take.start <= (plan.width or size)
        assert take.start == sum(stop - start for start, stop in plan.got), "rows are lost or done twice"


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_plans_with_cancels_and_failures(seed: int) -> None:
    chance = random.Random(seed)
    size = {"a": 8, "b": 3, "c": 1}
    plans = {
        job: Plan(
            lane=chance.choice("aabc"),
            questions=[int(chance.paretovariate(0.7)) % 300 + 1 for _ in range(chance.randint(1, 4))],
            width=chance.choice([None, None, 1, 2]),
            cancelled_at=chance.randint(0, 4000) if chance.random() < 0.15 else None,
            fails_at=chance.randint(1, 50) if chance.random() < 0.1 else None,
        )
        for job in range(1000)
    }
    scheduler: Scheduler[str] = Scheduler(size.__getitem__)
    arrivals = list(plans)
    waited = dict.fromkeys(plans, 0)
    longest = batches = 0
    while arrivals or len(scheduler):
        for _ in range(min(len(arrivals), chance.randint(0, 3))):
            job = arrivals.pop()
            ask(scheduler, job, plans[job])
        for job, plan in plans.items():
            if plan.cancelled_at == batches and plan.asked and not plan.ended:
                scheduler.remove(job)
                plan.ended = "cancelled"
        batch = scheduler.next_batch()
        batches += 1
        if batch is None:
            continue
        check(batch, size[batch.lane], plans)
        served = set()
        for take in batch.ranges:
            plan = plans[take.job]
            served.add(take.job)
            plan.got.append((take.start, take.stop))
            if plan.fails_at is not None and sum(e - s for s, e in plan.got) >= plan.fails_at:
                scheduler.remove(take.job)  # of this job alone
                plan.ended = "failed"
            elif take.stop == plan.questions[plan.asked - 1]:
                if plan.asked == len(plan.questions):
                    plan.ended = "done"
                else:
                    ask(scheduler, take.job, plan)
        for job, plan in plans.items():
            waiting = plan.asked and not plan.ended and job not in served
            waited[job] = waited[job] + 1 if waiting else 0
        longest = max(longest, *waited.values())
    assert {plan.ended for plan in plans.values()} <= {"done", "cancelled", "failed"}, "a plan is lost"
    for plan in plans.values():
        if plan.cancelled_at is None and plan.fails_at is None:
            assert plan.ended == "done"
    assert scheduler.rows_owed() == 0
    assert longest < 1500, "somebody starved"


def test_a_short_plan_passes_a_long_one() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 3000)
    scheduler.next_batch()
    scheduler.add(2, "forward", 1)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.ranges[0].job == 2
    assert sum(take.stop - take.start for take in batch.ranges) == 8, "the long plan fills what is left"


@pytest.mark.parametrize(("arrivals_in_ten", "least_share"), [(9, 0.099), (10, 0.02)])
def test_a_long_plan_is_not_starved_by_short_ones(arrivals_in_ten: int, least_share: float) -> None:
    """One-row plans arrive that take nearly all batches, or would take all of them; the long one goes on."""
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
    assert max(gaps) <= PATIENCE * 10 + backlog + 1, "1,024 rows count as one after ten halvings, then it is in turn"


def test_two_long_plans_share_a_batch() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 100)
    scheduler.add(2, "forward", 3000)
    batch = scheduler.next_batch()
    assert batch is not None
    assert [(take.job, take.stop - take.start) for take in batch.ranges] == [(1, 4), (2, 4)]


def test_alone_a_plan_has_the_whole_batch() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 20)
    sizes = []
    while (batch := scheduler.next_batch()) is not None:
        sizes.append([take.stop - take.start for take in batch.ranges])
    assert sizes == [[8], [8], [4]]


def test_a_heavier_plan_waits_but_does_not_starve() -> None:
    """Of two that owe as much: the light one has the batches, and now and then the other one half of one."""
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 3000, weight=16.0)
    scheduler.add(2, "forward", 3000, weight=1 / 16)
    taken = {1: 0, 2: 0}
    for _ in range(200):
        batch = scheduler.next_batch()
        assert batch is not None
        for take in batch.ranges:
            taken[take.job] += take.stop - take.start
    assert sum(taken.values()) == 1600
    assert 20 <= taken[1] <= 80


def test_a_light_plan_passes_a_shorter_one() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 8)
    scheduler.add(1, "forward", 200)
    scheduler.add(2, "forward", 3000, weight=1 / 16)
    batch = scheduler.next_batch()
    assert batch is not None
    assert [(take.job, take.stop - take.start) for take in batch.ranges] == [(2, 8)]


def test_an_iterative_plan_has_one_row_a_batch() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 4)
    scheduler.add(1, "ascend", 3, max_per_batch=1)
    scheduler.add(2, "ascend", 3, max_per_batch=1)
    for step in range(3):
        batch = scheduler.next_batch()
        assert batch is not None
        assert sorted((t.job, t.start, t.stop) for t in batch.ranges) == [(1, step, step + 1), (2, step, step + 1)]
    assert scheduler.next_batch() is None


def test_what_comes_later_counts_for_the_rank() -> None:
    scheduler: Scheduler[str] = Scheduler(lambda lane: 1)
    scheduler.add(1, "forward", 1, later_rows=5000)
    scheduler.add(2, "forward", 10)
    batch = scheduler.next_batch()
    assert batch is not None
    assert batch.ranges[0].job == 2
    assert scheduler.rows_owed() == 5010


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=1, max_size=20), st.integers(1, 16))
def test_every_row_is_given_out_once(questions: list[tuple[int, int]], size: int) -> None:
    scheduler: Scheduler[int] = Scheduler(lambda lane: size)
    for job, (rows, width) in enumerate(questions):
        scheduler.add(job, 0, rows, max_per_batch=width)
    given_out: dict[int, list[int]] = {job: [] for job in range(len(questions))}
    while (batch := scheduler.next_batch()) is not None:
        for take in batch.ranges:
            assert take.stop - take.start <= questions[take.job][1]
            given_out[take.job] += range(take.start, take.stop)
    assert given_out == {job: list(range(rows)) for job, (rows, _) in enumerate(questions)}


def test_it_needs_no_torch() -> None:
    code = "import sys, camserve_server.engine.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
