"""Load generator: statistics of known records, the search for the knee, and the sender with a stalling server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import camserve
from camserve import request_messages
from camserve_cli.load import knee, measure, mix, schedule, stats
from camserve_cli.load.measure import Load
from camserve_cli.load.mix import Mix, PreparedRequest
from camserve_cli.load.sender import LoadRun, Sender
from camserve_cli.load.stats import Measurement, Record
from camserve_server.errors import QueueFull
from camserve_server.service import status
from tests.client.fake_server import Servicer
from tests.processes import LIMIT_S


def record(intended_s: float, latency_s: float, code: str = "OK", **more: Any) -> Record:
    values: dict[str, Any] = {"method": "a", "image": 0, "sent_s": intended_s} | more
    return Record(**values, intended_s=intended_s, done_s=intended_s + latency_s, code=code)


# ---- send times and requests ----------------------------------------------------------------------------------------


def test_poisson_times_are_random_and_repeatable() -> None:
    times = schedule.poisson(200, 30, seed=3)
    assert times[-1] < 30
    assert scipy.stats.kstest(np.diff(times), "expon", args=(0, 1 / 200)).pvalue > 0.01
    assert abs(len(times) - 6000) < 4 * math.sqrt(6000)
    np.testing.assert_array_equal(times, schedule.poisson(200, 30, seed=3))
    assert len(times) != len(schedule.poisson(200, 30, seed=4))
    # A rate so low that no request falls into the time.
    np.testing.assert_array_equal(schedule.poisson(0.01, 5, seed=0), [])


def test_constant_times_have_equal_intervals() -> None:
    np.testing.assert_allclose(schedule.constant(4, 1), [0, 0.25, 0.5, 0.75])
    assert len(schedule.constant(10, 0.3)) == 3


def make_mix(weights: tuple[float, ...] = (1,), images: int = 1, model: str = "") -> Mix:
    def message(method: str) -> bytes:
        return request_messages.explain(mix.photograph(64, 64), model=model, method=method).request.SerializeToString()

    methods = "abc"[: len(weights)]
    return Mix([[PreparedRequest(method, i, message(method)) for i in range(images)] for method in methods], weights)


def test_requests_are_drawn_by_weight_and_repeatable() -> None:
    mixed = make_mix((8, 1.5, 0.5), images=4)
    drawn = list(itertools.islice(mixed.draw(seed=5), 5000))
    counts = Counter(request.method for request in drawn)
    assert scipy.stats.chisquare([counts[m] for m in "abc"], [4000, 750, 250]).pvalue > 0.01
    assert scipy.stats.chisquare([sum(request.image == i for request in drawn) for i in range(4)]).pvalue > 0.01
    assert drawn == list(itertools.islice(mixed.draw(seed=5), 5000))
    assert drawn != list(itertools.islice(mixed.draw(seed=6), 5000))


def test_synthetic_image_resembles_a_photograph() -> None:
    with PIL.Image.open(io.BytesIO(mix.photograph())) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (384, 512, 3)
    assert 20 < pixels.std() < 80
    assert 30_000 < len(mix.photograph()) < 200_000
    power = np.abs(np.fft.rfft2(pixels.mean(-1) - pixels.mean())) ** 2
    assert power[1:4, 1:4].mean() > 100 * power[40:50, 40:50].mean(), (
        "as in photographs, most power is at low frequencies"
    )


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_measured_values(values: list[float]) -> None:
    ordered = sorted(values)
    for name, value in stats.percentiles(values).items():
        share = stats.PERCENTILES[name]
        assert value in ordered
        assert sum(v <= value for v in values) >= share * len(values) - 1e-9
        assert sum(v < value for v in values) < share * len(values) + 1e-9


def test_summary_counts_requests_of_the_measurement() -> None:
    records = [
        record(-0.5, 0.2, rows=100),  # sent and answered during the warm-up
        record(-0.5, 1.0, rows=10),  # sent during the warm-up, answered after it
        record(0.0, 0.1, rows=1, queue_ms=3, compute_ms=7),
        record(0.5, 0.2, rows=1, queue_ms=5, compute_ms=9, sent_s=0.6),
        record(1.0, 3.0, rows=1, method="b"),  # answered after the end
        record(1.1, 0.001, "RESOURCE_EXHAUSTED", reason="QUEUE_FULL"),
        record(1.2, 0.001, "DEADLINE_EXCEEDED", reason="DEADLINE_UNREACHABLE"),
        record(1.3, 5.0, "DEADLINE_EXCEEDED"),
        record(1.4, 0.5, stats.UNFINISHED),
        record(2.0, 0.1, rows=1),  # sent after the end
    ]
    every = stats.summary(records, 2.0)
    assert (every.method, every.requests, every.answered) == ("all", 7, 3)
    assert (every.requests_per_s, every.rows_per_s) == (1.5, 6.0)
    assert every.errors == {
        "RESOURCE_EXHAUSTED QUEUE_FULL": 1,
        "DEADLINE_EXCEEDED DEADLINE_UNREACHABLE": 1,
        "DEADLINE_EXCEEDED": 1,
        "UNFINISHED": 1,
    }
    # Requests that were refused at once have no latency.
    latencies = sorted([100, 200, 3000, 5000, 500])
    assert [every.latency_ms[name] for name in ("p50", "max")] == pytest.approx([latencies[2], latencies[-1]])
    assert every.queue_ms["max"] == 5
    assert every.sent_late_ms["max"] == pytest.approx(100)
    assert stats.summary(records, 2.0, "b").latency_ms["p50"] == pytest.approx(3000)
    assert stats.summary([], 1.0).latency_ms == {}


def test_time_series_contains_all_requests() -> None:
    records = [record(i / 100, 0.05 if i < 500 else 0.5, method="ab"[i % 2]) for i in range(1000)]
    records += [record(3.0, 0.1, "UNAVAILABLE"), record(-1.0, 0.1)]
    series = stats.time_series(records, 10.0)
    width = 10 / len(series.middle_s)
    assert len(series.middle_s) == 60
    assert series.intended_per_s.sum() * width == pytest.approx(1001)
    assert series.failed_per_s.sum() * width == pytest.approx(1)
    assert series.p99_ms[:29] == pytest.approx(np.full(29, 50))
    assert series.p50_ms[31:] == pytest.approx(np.full(29, 500))


# ---- the knee -------------------------------------------------------------------------------------------------------


def search(first: float, least: float, most: float, meets: Callable[[float], bool]) -> dict[float, bool]:
    found: dict[float, bool] = {}
    rates = knee.candidate_rates(first, least, most)
    with contextlib.suppress(StopIteration):
        rate = next(rates)
        while True:
            found[rate] = meets(rate)
            rate = rates.send(found[rate])
    return found


@given(st.floats(0.02, 5000), st.floats(0.1, 500))
def test_search_finds_the_knee_within_the_tolerance(where: float, first: float) -> None:
    found = search(first, 0.01, 10_000, lambda rate: rate <= where)
    best = max(rate for rate, met in found.items() if met)
    missed = min((rate for rate, met in found.items() if not met), default=math.inf)
    assert best <= where < missed <= best * (1 + knee.TOLERANCE)
    assert len(found) <= abs(math.log2(where / first)) + 8


def test_search_ends_at_the_lowest_and_highest_rate() -> None:
    assert search(8, 1, 100, lambda _: False) == {8: False, 4: False, 2: False, 1: False}
    assert search(30, 1, 100, lambda _: True) == {30: True, 60: True, 100: True}


def test_monitor_reports_a_bound_that_cannot_be_met() -> None:
    quick, slow = [record(i / 100, 0.1) for i in range(198)], [record(0.5, 0.6) for _ in range(3)]
    assert not knee.BoundMonitor(0.5, 200, 2.0).missed([*quick, *slow[:2]])
    assert knee.BoundMonitor(0.5, 200, 2.0).missed([*quick, *slow])
    assert knee.BoundMonitor(0.5, 200, 2.0).missed([record(0, 0.1, "UNAVAILABLE")] * 3)
    assert not knee.BoundMonitor(0.5, 200, 2.0).missed([record(-1, 9.0), record(2.0, 9.0)] * 5), (
        "not of the time measured"
    )
    # Records arrive step by step. Pending requests count once they have waited longer than the bound.
    monitor, records = knee.BoundMonitor(0.5, 200, 2.0), slow[:1]
    assert not monitor.missed(records, pending=[0.1, -0.5, 0.8], now_s=1.0)
    records += slow[1:2]
    assert monitor.missed(records, pending=[0.1, -0.5, 0.8], now_s=1.0)
    assert not monitor.missed(records, pending=[0.8], now_s=1.0)


# ---- the sender -----------------------------------------------------------------------------------------------------


def measured(
    address: str,
    send: Callable[[Load], Awaitable[Measurement]],
    mixed: Mix | None = None,
    seconds: float = 1.0,
    **more: Any,
) -> Measurement:
    async def run() -> Measurement:
        senders = [Sender(address, timeout=20) for _ in range(more.pop("connections", 2))]
        try:
            return await send(Load(mixed or make_mix(), 0.0, seconds, senders=senders, **more))
        finally:
            for sender in senders:
                await sender.close()

    return asyncio.run(run())


class Stall:
    """Function that makes a server stall for some seconds at its eleventh call."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls = itertools.count()
        self.until = 0.0

    def __call__(self, _: Any) -> None:
        if next(self.calls) == 10:
            self.until = time.perf_counter() + self.seconds
        time.sleep(max(0.0, self.until - time.perf_counter()))


@pytest.mark.slow
def test_open_loop_measures_a_stall_of_the_server(address: str, servicer: Servicer) -> None:
    servicer.before = Stall(1.0)
    found = measured(address, lambda load: measure.run_open_loop(load, 40, even=True), seconds=1.5)
    assert len(found.records) == 60
    # Requests that are sent in the first half of the stall wait at least until its end.
    assert sum(each.latency_s > 0.45 for each in found.records) >= 18
    assert found.summary().latency_ms["p90"] > 500
    # In a closed loop, only the pending requests notice the stall.
    servicer.before = Stall(1.0)
    few = measured(address, lambda load: measure.run_closed_loop(load, 1), seconds=1.5)
    assert sum(each.latency_s > 0.45 for each in few.records) < 10


@pytest.mark.slow
def test_latency_includes_delays_of_the_sender(address: str) -> None:
    stalled: list[float] = []

    def should_continue(run: LoadRun) -> bool:
        if run.now_s > 0.2 and not stalled:
            stalled.append(run.now_s)
            time.sleep(0.6)
        return True

    found = measured(address, lambda load: measure.run_open_loop(load, 50, even=True), should_continue=should_continue)
    assert len(found.records) == 50
    assert sum(each.latency_s > 0.25 for each in found.records) >= 14
    assert found.summary().sent_late_ms["p90"] > 250


def test_closed_loop_keeps_requests_pending_on_all_connections(address: str, servicer: Servicer) -> None:
    lock, peers = threading.Lock(), set()
    pending = most = 0
    # The first three calls wait for each other, so that they are pending at the same time on any machine.
    together = threading.Barrier(3)
    calls = itertools.count()

    def before(context: grpc.ServicerContext) -> None:
        nonlocal pending, most
        with lock:
            peers.add(context.peer())
            pending += 1
            most = max(most, pending)
        if next(calls) < 3:
            together.wait(LIMIT_S)
        with lock:
            pending -= 1

    servicer.before = before
    load = measured(
        address,
        lambda load: measure.run_closed_loop(load, 3),
        make_mix((1, 1)),
        connections=3,
        seconds=600,
        should_continue=lambda run: len(run.records) < 6,
    )
    assert (most, len(peers)) == (3, 3)
    answered = [each for each in load.records if each.answered]
    assert len(answered) >= 6
    assert len(load.records) - len(answered) <= 3, "only pending requests are unfinished"
    assert len(load.records) - 3 <= len(servicer.requests) <= len(load.records)
    assert Counter(each.method for each in answered) <= Counter(each.method.name for each in servicer.requests)
    assert {(each.code, each.rows, each.batches) for each in answered} == {("OK", 12, 3)}
    assert {(each.queue_ms, each.compute_ms) for each in answered} == {(1.5, 20.25)}


@pytest.mark.slow
def test_refused_requests_are_counted_and_not_retried(address: str, servicer: Servicer) -> None:
    calls = itertools.count()

    def before(context: grpc.ServicerContext) -> None:
        if next(calls) % 2:
            error = QueueFull("too many rows are owed", retry_after_s=0.01)
            context.set_trailing_metadata(status.trailing_metadata(error, "given"))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)

    servicer.before = before
    found = measured(address, lambda load: measure.run_open_loop(load, 20, even=True)).summary()
    assert (found.requests, found.errors) == (20, {"RESOURCE_EXHAUSTED QUEUE_FULL": 10})
    assert len(servicer.requests) == 20


def test_invalid_request_ends_the_load_with_its_error(address: str, servicer: Servicer) -> None:
    servicer.before = lambda context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")
    with pytest.raises(camserve.InvalidArgument, match="no such thing"):
        measured(address, lambda load: measure.run_open_loop(load, 0.01, even=True), seconds=600)
    assert len(servicer.requests) == 1


def test_ended_load_cancels_pending_requests(address: str, servicer: Servicer) -> None:
    found = measured(
        address,
        lambda load: measure.run_closed_loop(load, 2),
        make_mix(model="slow"),
        seconds=600,
        should_continue=lambda _: not servicer.started.is_set(),
    )
    assert servicer.cancelled.wait(LIMIT_S)
    assert [each.code for each in found.records] == [stats.UNFINISHED] * 2
    assert 0 < found.seconds < 600
    assert found.summary().latency_ms["max"] >= 0


@pytest.mark.parametrize("ticks", range(4))
def test_cancelled_load_sends_no_further_requests(address: str, servicer: Servicer, ticks: int) -> None:
    """A second Ctrl-C cancels all tasks at the same time, as `asyncio.run` does it."""

    async def scenario() -> None:
        load = Load(make_mix(model="slow"), 0, 600, senders=[Sender(address)])
        measuring = asyncio.create_task(measure.run_closed_loop(load, 2))
        assert await asyncio.to_thread(servicer.started.wait, LIMIT_S)
        for _ in range(ticks):
            await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        _, running = await asyncio.wait(tasks, timeout=LIMIT_S)
        await load.senders[0].close()
        assert not running
        assert measuring.cancelled()

    asyncio.run(scenario())
    assert len(servicer.requests) <= 2
