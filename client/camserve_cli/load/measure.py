"""Measurements of a load: in a closed loop, in an open loop, and for the knee."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from camserve_cli.load import batch_fill, schedule
from camserve_cli.load.knee import BoundMonitor, Step, candidate_rates
from camserve_cli.load.mix import Mix
from camserve_cli.load.sender import LoadRun, Sender, ShouldContinue, closed_loop, open_loop
from camserve_cli.load.stats import Measurement, Numbers

__all__ = ["MIN_REQUESTS", "Load", "run_closed_loop", "run_open_loop", "search_knee"]

# The search for the knee ends at the rate that sends this many requests: fewer do not determine a 99th percentile.
MIN_REQUESTS = 10


@dataclass(frozen=True)
class Load:
    """Requests to send, their senders, and the duration. The same seed draws the same requests at the same times.

    Attributes:
        mix: The requests and their weights.
        warmup: Seconds before the measurement. Their requests are recorded and left out of every figure.
        seconds: Duration of the measurement.
        seed: Seed of the random choices.
        metrics_url: Address of the server's Prometheus metrics, from which the fill of the batches is read.
        should_continue: Function that is called about ten times per second. The load ends when it returns False.
        senders: Connections to the server. Requests use them in turn.
    """

    mix: Mix
    warmup: float
    seconds: float
    seed: int = 0
    metrics_url: str | None = None
    should_continue: ShouldContinue = lambda _: True
    senders: Sequence[Sender] = ()


async def run_closed_loop(load: Load, in_flight: int) -> Measurement:
    """Measure a closed loop that keeps `in_flight` requests pending."""
    requests = load.mix.draw(load.seed)
    return await _measure(load, None, lambda run: closed_loop(run, requests, in_flight, load.should_continue))


async def run_open_loop(
    load: Load, rate: float, *, even: bool = False, should_continue: ShouldContinue | None = None
) -> Measurement:
    """Measure an open loop.

    Args:
        load: The requests and the duration.
        rate: Requests per second.
        even: Send at equal intervals instead of at random times.
        should_continue: Replaces the function of the load.
    """
    requests, times = load.mix.draw(load.seed), _times(load, rate, even).tolist()
    condition = should_continue or load.should_continue
    return await _measure(load, rate, lambda run: open_loop(run, requests, times, condition))


async def search_knee(load: Load, bound_s: float, first: float, *, even: bool = False) -> AsyncIterator[Step]:
    """Measure rates until the knee is found.

    Args:
        load: The requests, and the duration of each rate.
        bound_s: Bound of the 99th percentile of latency, in seconds.
        first: The first rate, in requests per second.
        even: Send at equal intervals instead of at random times.

    Yields:
        Each rate as soon as it is measured. A rate that `load.should_continue` ended is left out.
    """
    rates = candidate_rates(first, MIN_REQUESTS / load.seconds)
    rate = next(rates)
    while True:
        monitor = BoundMonitor(bound_s, int(np.sum(_times(load, rate, even) >= load.warmup)), load.seconds)
        interrupted = dropped = False

        def should_continue(run: LoadRun, monitor: BoundMonitor = monitor) -> bool:
            nonlocal interrupted, dropped
            interrupted = not load.should_continue(run)
            dropped = monitor.missed(run.records, run.pending.values(), run.now_s)
            return not interrupted and not dropped

        measured = await run_open_loop(load, rate, even=even, should_continue=should_continue)
        if interrupted:
            return
        met = not monitor.missed(measured.records)
        yield Step(rate, met, dropped, measured)
        try:
            rate = rates.send(met)
        except StopIteration:
            return


def _times(load: Load, rate: float, even: bool) -> Numbers:
    seconds = load.warmup + load.seconds
    return schedule.constant(rate, seconds) if even else schedule.poisson(rate, seconds, load.seed)


async def _measure(load: Load, rate: float | None, send: Callable[[LoadRun], Awaitable[LoadRun]]) -> Measurement:
    url = load.metrics_url
    before = await asyncio.to_thread(batch_fill.read_counters, url) if url else None
    run = await send(LoadRun(load.senders, load.warmup, load.seconds))
    after = await asyncio.to_thread(batch_fill.read_counters, url) if url else None
    fill = batch_fill.fill_share(before, after) if before and after else None
    return Measurement(rate, run.measured_s, run.records, fill)
