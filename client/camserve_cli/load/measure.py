"""Measures a load: in a closed loop, at a rate, or for the knee."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from camserve_cli.load import fill, schedule
from camserve_cli.load.knee import Step, Watch, rates
from camserve_cli.load.mix import Mix
from camserve_cli.load.run import Run, Sender, Watched, closed_loop, open_loop
from camserve_cli.load.stats import Measured, Numbers

__all__ = ["LEAST_REQUESTS", "Load", "at_rate", "in_flight", "steps"]

# At rates of fewer requests in the time that is measured, there is nothing to say of the 99th percentile.
LEAST_REQUESTS = 10


@dataclass(frozen=True)
class Load:
    """What is asked for, by whom, and for how long. The same seed draws the same requests, at the same times.

    `goes_on` is asked often, and ends the load by False. With a `metrics_url` the server is asked how full its batches
    were.
    """

    mix: Mix
    warmup: float
    seconds: float
    seed: int = 0
    metrics_url: str | None = None
    goes_on: Watched = lambda _: True
    senders: Sequence[Sender] = ()


async def in_flight(load: Load, requests: int) -> Measured:
    """In a closed loop of so many requests."""
    asks = load.mix.draw(load.seed)
    return await _measured(load, None, lambda run: closed_loop(run, asks, requests, load.goes_on))


async def at_rate(load: Load, rate: float, *, even: bool = False, goes_on: Watched | None = None) -> Measured:
    """In an open loop of so many requests a second, at random times or evenly."""
    asks, times = load.mix.draw(load.seed), _times(load, rate, even).tolist()
    return await _measured(load, rate, lambda run: open_loop(run, asks, times, goes_on or load.goes_on))


async def steps(load: Load, bound_s: float, first: float, *, even: bool = False) -> AsyncIterator[Step]:
    """The rates that are tried for the knee, each as it is done. Ended by `goes_on`, the last one is left out."""
    tried = rates(first, LEAST_REQUESTS / load.seconds)
    rate = next(tried)
    while True:
        watch = Watch(bound_s, int(np.sum(_times(load, rate, even) >= load.warmup)), load.seconds)
        ended = dropped = False

        def goes_on(run: Run, watch: Watch = watch) -> bool:
            nonlocal ended, dropped
            ended = not load.goes_on(run)
            dropped = watch.missed(run.records, run.pending.values(), run.now_s)
            return not ended and not dropped

        measured = await at_rate(load, rate, even=even, goes_on=goes_on)
        if ended:
            return
        met = not watch.missed(measured.records)
        yield Step(rate, met, dropped, measured)
        try:
            rate = tried.send(met)
        except StopIteration:
            return


def _times(load: Load, rate: float, even: bool) -> Numbers:
    seconds = load.warmup + load.seconds
    return schedule.constant(rate, seconds) if even else schedule.poisson(rate, seconds, load.seed)


async def _measured(load: Load, rate: float | None, send: Callable[[Run], Awaitable[Run]]) -> Measured:
    url = load.metrics_url
    before = await asyncio.to_thread(fill.read, url) if url else None
    run = await send(Run(load.senders, load.warmup, load.seconds))
    full = fill.fill(before, await asyncio.to_thread(fill.read, url)) if url and before else None
    return Measured(rate, run.measured_s, run.records, full)
