"""Rows and limits of a request, computed before the engine sees it."""

from __future__ import annotations

import math
import time

import pytest
import torch

from camserve_server.errors import OutOfRange
from camserve_server.models.model import Model
from camserve_server.plan import Resize, SaliencyMaps
from camserve_server.request_plan import limits, rows_needed
from camserve_server.request_result import finish_maps
from camserve_server.rows import resize_minmax
from tests import nets
from tests.support import as_model, call, metric, noise


@pytest.fixture
def model() -> Model:
    return as_model(nets.tiny_cnn())


def test_rows_needed_are_those_of_prediction_method_and_metrics(model: Model) -> None:
    rise, insertion = call(model, "rise", masks=400), metric("insertion", steps=20)
    rows = rows_needed(model, rise, [insertion], 2)
    assert (rows.most, rows.metrics, rows.can_stop_early) == (1 + 400 + 2 * 20, 2 * 20, True)
    assert 1 + 2 * 20 < rows.least < rows.most
    without_map = rows_needed(model, None, [insertion], 1)
    assert (without_map.most, without_map.least, without_map.can_stop_early) == (21, 21, False)


def test_a_method_that_can_stop_early_keeps_time_for_metrics_and_the_response(model: Model) -> None:
    model.throughput["forward"].observe(100, 1.0)
    rise = call(model, "rise", masks=400)
    rows = rows_needed(model, rise, [metric("insertion", steps=20)], 1)
    now = time.monotonic()
    bounded = limits(model, rise, rows, deadline=now + 10)
    assert bounded.deadline == now + 10
    assert bounded.answer_early_from == pytest.approx(
        now + 10 - 1.5 * 20 / 100 - 0.1 * 10, abs=0.1 * (time.monotonic() - now) + 1e-6
    )
    assert (bounded.metric_rows, bounded.least, bounded.rows_per_s) == (20, rows.least, 100.0)


def test_a_method_that_cannot_stop_early_runs_until_its_deadline(model: Model) -> None:
    model.throughput["forward"].observe(100, 1.0)
    occlusion = call(model, "occlusion")
    bounded = limits(model, occlusion, rows_needed(model, occlusion, [], 1), deadline=time.monotonic() + 10)
    assert bounded.answer_early_from is None


def test_a_budget_below_the_fewest_rows_is_refused(model: Model) -> None:
    occlusion = call(model, "occlusion")
    rows = rows_needed(model, occlusion, [], 1)
    with pytest.raises(OutOfRange, match="cannot stop early; the budget is 3") as caught:
        limits(model, occlusion, rows, budget=3)
    assert caught.value.field == "budget"
    assert limits(model, occlusion, rows, budget=rows.least).budget == rows.least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("targets", "side"), [(1, 7), (3, 14), (2, 96)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_maps_on_the_host_are_finished_with_the_same_bits(
    dtype: torch.dtype, targets: int, side: int, scale: float
) -> None:
    raw = (noise(targets, side, side) * scale).to(dtype)
    before = raw.clone()
    maps, warnings = finish_maps(SaliencyMaps(raw), (96, 96))
    general, _ = finish_maps(SaliencyMaps(raw, finish=resize_minmax), (96, 96))
    assert torch.equal(maps, general)
    assert torch.equal(raw, before), "the raw map of the response does not change"
    assert warnings == ((),) * targets


@pytest.mark.parametrize("size", [(7, 7), (96, 96)])
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ((0.0, 0.0), "constant"),
        ((math.nan, 0.0), "not finite"),
        ((math.inf, 0.0), "not finite"),
        ((math.nan, math.nan), "not finite"),
        ((-math.inf, -math.inf), "not finite"),
    ],
)
def test_a_constant_or_infinite_map_among_others_becomes_zeros(
    values: tuple[float, float], problem: str, size: tuple[int, int]
) -> None:
    raw = noise(3, 7, 7)
    raw[1] = values[1]
    raw[1, 0, 0] = values[0]
    maps, warnings = finish_maps(SaliencyMaps(raw), size)
    assert [bool(each.any()) for each in maps] == [True, False, True]
    assert warnings == ((), (f"degenerate: the map is {problem}; zeros are returned",), ())
    alone, _ = finish_maps(SaliencyMaps(raw[:1]), size)
    assert torch.equal(maps[0], alone[0])


@pytest.mark.parametrize("size", [(7, 7), (96, 96)])
@pytest.mark.parametrize("finish", [None, resize_minmax])
@pytest.mark.parametrize(("dtype", "low_contrast"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
@pytest.mark.parametrize("value", [0.3, -7e8])
def test_a_map_that_is_constant_up_to_rounding_becomes_zeros(
    value: float, dtype: torch.dtype, low_contrast: float, finish: Resize | None, size: tuple[int, int]
) -> None:
    """Its differences are no contrast, unless they are many times the precision."""
    raw = torch.full((2, 7, 7), value, dtype=dtype)
    raw[0, 2:, 3] *= 1 + 10 * torch.finfo(dtype).eps
    raw[1, 2:, 3] *= 1 + low_contrast
    maps, warnings = finish_maps(SaliencyMaps(raw, finish=finish), size)
    assert [bool(each.any()) for each in maps] == [False, True]
    assert warnings == (("degenerate: the map is constant; zeros are returned",), ())
