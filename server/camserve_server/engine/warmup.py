"""Warm-up of a model.

The warm-up measures the batch size of each kind of lane and runs everything that is slow the first time. Queries with
few rows have small lanes where a batch cannot become smaller without a change of bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import structlog
import torch
from torch import Tensor

from camserve_server.engine.lanes.ascend import forget_slots
from camserve_server.engine.lanes.dispatch import BatchSlice, run_batch, start_query
from camserve_server.engine.lanes.fast_forward import build_fast_forward
from camserve_server.engine.lanes.smaller_batches import compare_sizes, find_linear_layers
from camserve_server.errors import RemoteFailed, Unservable, describe
from camserve_server.models.model import SMALL_KINDS, LaneKind, Model, Passes
from camserve_server.plan import INPUT, Ascend, Gradient, Query, Score, Targets
from camserve_server.rows import Repeated

log = structlog.get_logger()

SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
REMOTE_SIZES = (1, 4, 16)  # few, because each takes several requests to a server with other callers
# Share of the best throughput that a batch size must reach. It is smaller for ascents, because a single ascent has one
# row in each batch and pays for the padding rows of a large one.
MIN_THROUGHPUT_SHARE: dict[Passes, float] = {"forward": 0.97, "gradient": 0.95, "ascend": 0.7}
MIN_SMALL_SHARE = 0.5  # the same of small lanes, in which many requests with few rows must run fast, too
MEASURE_S = 0.4  # measuring time of each batch size where sizes are compared
SHORT_MEASURE_S = 0.05  # measuring time where the batch size is configured
MAX_BATCH_S = 2.0  # a batch that takes longer would make cancellation slow, even if its throughput is high


def warm_up(model: Model, batch_size: int | None = None) -> None:
    """Set `batch_sizes`, `throughput`, `fast_forward`, `fast_forward_size` and `compiled` of the model.

    Args:
        model: Model to warm up.
        batch_size: Number of rows of all batches; there are no small lanes then. If None, each kind gets the smallest
            size whose throughput is close enough to the best (`MIN_THROUGHPUT_SHARE`, `MIN_SMALL_SHARE`).
    """
    for _ in warm_up_steps(model, dict.fromkeys(get_args(Passes), batch_size) if batch_size else {}):
        pass


def warm_up_steps(model: Model, known: Mapping[LaneKind, int]) -> Iterator[None]:
    """Warm up the model as `warm_up` does, and yield before each batch.

    The engine's thread runs batches of other requests between the steps.

    Args:
        model: Model to warm up.
        known: Batch sizes that are configured or were measured before. The others are measured. If the size of a lane
            is known, but not that of the small lane for the same passes, there is no such small lane.

    Yields:
        None, before each batch.
    """
    model.fast_forward = None  # of an earlier warm-up
    yield from measure_steps(model, known, model.batch_sizes)
    yield from _compare_steps(model)
    yield
    size = model.batch_sizes["forward"]
    model.fast_forward = build_fast_forward(model, size)
    if model.fast_forward is not None:
        model.fast_forward_size = size
        took = yield from _batch_seconds(model, _example_queries(model)["forward"], MEASURE_S, size)
        model.throughput["forward"].observe(size, took)


def measure_steps(model: Model, known: Mapping[LaneKind, int], sizes: dict[LaneKind, int]) -> Iterator[None]:
    """Measure batch sizes of the model, which stays as it is, and yield before each batch.

    Args:
        model: Model to measure.
        known: As in `warm_up_steps`.
        sizes: Receives the batch size of each kind of lane. Small lanes that are useless because the model has
            `equal_sizes` are included.

    Yields:
        None, before each batch.
    """
    for kind, query in _example_queries(model).items():
        if model.remote and kind in model.unavailable:
            sizes[kind] = sizes["forward"]
            continue
        try:
            found = yield from _measure_kind(model, kind, query, known)
        except (Unservable, NotImplementedError, RuntimeError, TypeError) as error:
            if kind == "forward" or isinstance(error, torch.OutOfMemoryError) or _is_device_failure(error):
                raise
            # Methods that use the other kinds of lane can still be served.
            reason = error.message if isinstance(error, Unservable) else describe(error)
            log.warning("a kind of lane cannot be served", model=model.name, lane=kind, reason=reason)
            model.unavailable[kind] = reason
            found = {kind: sizes["forward"]}
        if kind in SMALL_KINDS:
            sizes.pop(SMALL_KINDS[kind], None)  # of an earlier warm-up
        sizes.update(found)
    forget_slots(model)  # of the sizes that were tried


def _measure_kind(
    model: Model, kind: Passes, query: Callable[[int], Query[Any]], known: Mapping[LaneKind, int]
) -> Generator[None, None, dict[LaneKind, int]]:
    """Return the batch size of the lane for these passes, and that of their small lane if there is one."""
    tried = _tried_sizes(model, known.get(kind))
    at_least_s = 0.0 if model.remote else SHORT_MEASURE_S if len(tried) == 1 else MEASURE_S
    seconds = partial(_batch_seconds, model, query, at_least_s)
    rates = yield from measure_rates(seconds, tried, MIN_THROUGHPUT_SHARE[kind])
    size = smallest_size(rates, MIN_THROUGHPUT_SHARE[kind])
    sizes: dict[LaneKind, int] = {kind: size}
    if kind in SMALL_KINDS:
        if kind in known:
            small = known.get(SMALL_KINDS[kind], size)
        else:
            small = smallest_size(rates, MIN_SMALL_SHARE)
            if kind == "gradient" and model.device.type == "cpu":
                small = max(2, small)  # torch computes wrong gradients of some batch norms in batches of one row
        if small < size:
            sizes[SMALL_KINDS[kind]] = small
            if small not in rates:  # its first batches are slow, like those of any other size
                rates |= yield from measure_rates(seconds, (small,), MIN_SMALL_SHARE)
    for each, rows in sizes.items():
        model.throughput[each].observe(rows, rows / rates[rows])
    return sizes


def _compare_steps(model: Model) -> Iterator[None]:
    """Find the smaller batch sizes that give the same bits, and yield before each batch.

    Where there are such sizes, small lanes could only give a query with few rows other bits. They are removed.
    """
    # Kernels of GPUs split their work by the whole batch. Remote servers can add rows of other callers.
    if model.device.type != "cpu" or model.remote is not None:
        return
    model.linear_layers = find_linear_layers(model)
    found: dict[tuple[int, bool], tuple[int, ...]] = {}
    kinds: tuple[Passes, ...] = get_args(Passes)
    for kind in kinds:
        size = model.batch_sizes[kind]
        key = size, kind != "forward"
        if kind not in model.unavailable and size > 1:
            if key not in found:
                found[key] = yield from compare_sizes(model, size, gradients=key[1])
            model.equal_sizes[kind] = found[key]
            if kind in SMALL_KINDS and len(found[key]) > 1:
                model.batch_sizes.pop(SMALL_KINDS[kind], None)


def _tried_sizes(model: Model, known: int | None) -> tuple[int, ...]:
    if model.one_row:
        return (1,)
    if known is not None:
        return (known,)
    if model.remote is not None:
        return (model.remote.max_rows,) if model.remote.max_rows else REMOTE_SIZES
    return SIZES[model.device.type]


def _is_device_failure(error: Exception) -> bool:
    """Return True if the device and not the network is the reason of an error."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def measure_rates(
    seconds: Callable[[int], Generator[None, None, float]], sizes: tuple[int, ...], min_share: float
) -> Generator[None, None, dict[int, float]]:
    """Measure the throughput of batch sizes.

    The measurement ends early at a size that does not fit into memory or that a remote server refuses, at a batch that
    takes longer than `MAX_BATCH_S`, and once two sizes in a row are below `min_share` of the best throughput.

    Args:
        seconds: Generator function from a batch size to the time of one batch in seconds.
        sizes: Batch sizes in ascending order.
        min_share: Share of the best throughput, in [0, 1].

    Yields:
        None, whenever `seconds` does.

    Returns:
        The throughput in rows per second by batch size, ascending.

    Raises:
        torch.OutOfMemoryError: Not even the first size fits into memory.
    """
    rates: dict[int, float] = {}
    for size in sizes:
        try:
            took = yield from seconds(size)
        except (torch.OutOfMemoryError, RemoteFailed):  # a remote server refuses batches that are too large
            if not rates:
                raise
            break
        rates[size] = size / took
        best = max(rates.values())
        if took > MAX_BATCH_S or (len(rates) > 2 and max([*rates.values()][-2:]) < min_share * best):
            break
    return rates


def smallest_size(rates: Mapping[int, float], min_share: float) -> int:
    """Return the smallest batch size whose throughput is close enough to the best.

    Args:
        rates: Throughput by batch size, ascending.
        min_share: Share of the best throughput that is close enough, in [0, 1].
    """
    return next(size for size, rate in rates.items() if rate >= min_share * max(rates.values()))


def _example_queries(model: Model) -> dict[Passes, Callable[[int], Query[Any]]]:
    """Return for each kind of lane a function from a batch size to a query that fills one batch."""
    x = model.image(torch.zeros(model.preprocessing.channels, *model.preprocessing.size))
    none = torch.zeros(1, dtype=torch.float64, device=model.device)
    c = Targets((0,), none, none)
    layer = model.layer.name if model.layer else INPUT
    return {
        "forward": lambda size: Score(Repeated(x, size), c),
        "gradient": lambda size: Gradient(Repeated(x, size), [0] * size, (layer,)),
        "ascend": lambda size: Ascend(
            torch.ones(size, 1, device=model.device, dtype=model.dtype),
            ScaledImages(),
            (x.tensor.expand(size, -1, -1, -1),),
            1,
            1.0,
        ),
    }


@dataclass(frozen=True)
class ScaledImages:
    """Step of an ascent: images [B, 3, H, W], multiplied by variables [B, 1], and the logit of the first class."""

    def rows(self, u: Tensor, of: tuple[Tensor]) -> Tensor:
        """Return the products."""
        return of[0] * u[:, :, None, None]

    def objectives(self, y: Tensor, of: tuple[Tensor]) -> Tensor:
        """Return the logits [B]."""
        return y[:, 0]


def _batch_seconds(
    model: Model, query: Callable[[int], Query[Any]], at_least_s: float, size: int
) -> Generator[None, None, float]:
    """Run batches for `at_least_s` seconds, at least three, and return the shortest time; yield before each batch."""
    forget_slots(model)  # of smaller sizes, whose graphs keep memory
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least_s:
        yield
        lane, started = start_query(query(size), model, dict.fromkeys(get_args(Passes), size))
        _synchronize(model)
        start = time.perf_counter()
        with torch.no_grad():
            run_batch(model, lane, [BatchSlice(started, 0, size)], size)
        _synchronize(model)
        times.append(time.perf_counter() - start)
    return min(times)  # other processes on the machine can only make a batch slower


def _synchronize(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
