"""Finds each lane's batch size, and on the way makes everything warm that is slow the first time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, get_args

import structlog
import torch

from camserve_server.engine.lanes.dispatch import Part, run, start_work
from camserve_server.engine.lanes.fast_forward import bare
from camserve_server.errors import Unservable
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import INPUT, Ascend, Gradient, Query, Score, Targets
from camserve_server.rows import Repeated

log = structlog.get_logger()

SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
# The share of the best throughput that is enough. An ascent brings one row a batch: a lone one pays for the padding.
NEAR_BEST: dict[LaneKind, float] = {"forward": 0.97, "gradient": 0.95, "ascend": 0.7}
MEASURE_S = 0.4  # where sizes are compared
GLANCE_S = 0.05
SLOW_S = 2.0  # a batch that takes longer would make cancelling slow, whatever its throughput


def warm_up(model: Model, batch_size: int | None = None) -> None:
    """Sets `model.batch_sizes`: the smallest near enough to the best throughput, or `batch_size` for all lanes."""
    for _ in warming_up(model, batch_size):
        pass


def warming_up(model: Model, batch_size: int | None = None) -> Iterator[None]:
    """The same batch by batch, for a thread that has others to run between them."""
    for kind, query in _queries(model).items():
        sizes = (batch_size,) if batch_size else SIZES[model.device.type]
        try:
            seconds = partial(_seconds, model, query, GLANCE_S if batch_size else MEASURE_S)
            size, model.rows_per_s[kind] = yield from _best(seconds, sizes, NEAR_BEST[kind])
        except Unservable as error:  # methods of other lanes can be served all the same
            log.warning("a lane cannot be served", model=model.name, lane=kind, reason=error.message)
            size = model.batch_sizes["forward"]
        model.batch_sizes[kind] = size
    yield
    size = model.batch_sizes["forward"]
    model.bare = bare(model, size)
    if model.bare is not None:
        model.bare_size = size
        took = yield from _seconds(model, _queries(model)["forward"], MEASURE_S, size)
        model.rows_per_s["forward"] = size / took


def _queries(model: Model) -> dict[LaneKind, Callable[[int], Query[Any]]]:
    x = model.image(torch.zeros(model.preprocessing.channels, *model.preprocessing.size))
    none = torch.zeros(1, dtype=torch.float64, device=model.device)
    c = Targets((0,), none, none)
    layer = model.layer.name if model.layer else INPUT
    return {
        "forward": lambda size: Score(Repeated(x, size), c),
        "gradient": lambda size: Gradient(Repeated(x, size), [0] * size, (layer,)),
        "ascend": lambda size: Ascend(
            torch.ones(size, 1, device=model.device, dtype=model.dtype),
            lambda u: x.tensor * u,
            lambda t, y: y[0],
            1,
            1.0,
        ),
    }


def _best(
    seconds: Callable[[int], Generator[None, None, float]], sizes: tuple[int, ...], near: float
) -> Generator[None, None, tuple[int, float]]:
    """The size, and its rows a second."""
    rates: dict[int, float] = {}
    for size in sizes:
        try:
            took = yield from seconds(size)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        rates[size] = size / took
        best = max(rates.values())
        if took > SLOW_S or (len(rates) > 2 and max([*rates.values()][-2:]) < near * best):
            break
    return next((size, rate) for size, rate in rates.items() if rate >= near * max(rates.values()))


def _seconds(
    model: Model, query: Callable[[int], Query[Any]], at_least_s: float, size: int
) -> Generator[None, None, float]:
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least_s:
        yield
        lane, work = start_work(query(size), model, dict.fromkeys(get_args(LaneKind), size))
        _synchronize(model)
        start = time.perf_counter()
        with torch.no_grad():
            run(model, lane, [Part(work, 0, size)], size)
        _synchronize(model)
        times.append(time.perf_counter() - start)
    return min(times)  # whatever else the machine does only adds to it


def _synchronize(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
