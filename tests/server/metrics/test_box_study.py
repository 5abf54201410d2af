"""Average drop, increase and gain under the target, and under the map inside and outside the target."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from camserve_server import registry
from camserve_server.maps import boxes
from camserve_server.models.model import Model
from camserve_server.plan import Truth
from tests import nets
from tests.oracles.average import average_of_one
from tests.support import TIMEOUT_S, as_model, explained, metric, noise, running, submit

SIZE = (H, W) = (32, 24)
REGIONS, MEASURES = ("box", "inside", "outside"), ("drop", "increase", "gain")
NAMES = [f"{region}-{measure}" for region in REGIONS for measure in MEASURES]
AVERAGES = [f"average-{measure}" for measure in MEASURES]
X = noise(3, *SIZE, seed=1).double()
S = noise(*SIZE, seed=2).sigmoid()
EVERYWHERE = boxes.make_truth([(0, 0, W, H)], None, SIZE)


@cache
def model() -> Model:
    return as_model(nets.tiny_cnn(), SIZE, dtype=torch.float64)


def scores(names: list[str], truth: Truth, c: int = 1) -> dict[str, float]:
    (found,) = explained(model(), X, S, [c], [metric(name) for name in names], truth=truth).scores
    return {name: score.value for name, score in zip(names, found, strict=True)}


def logits(x: Tensor) -> list[float]:
    values: list[float] = model().module(x[None])[0].tolist()
    return values


@pytest.mark.parametrize("c", [1, 2, 5])
def test_metrics_follow_their_definitions(c: int) -> None:
    """The target is the union of two boxes. A pixel is inside if its centre is."""
    B = torch.zeros(SIZE, dtype=torch.float64)
    for y in range(H):
        for x in range(W):
            B[y, x] = (4 < x + 0.5 < 12.4 and 3 < y + 0.5 < 20) or (10 < x + 0.5 < 22 and 15 < y + 0.5 < 30)
    ours = scores(NAMES, boxes.make_truth([(4, 3, 12.4, 20), (10, 15, 22, 30)], None, SIZE), c)
    for region, mask in zip(REGIONS, (B, S * B, S * (1 - B)), strict=True):
        theirs = average_of_one(logits(X), logits(X * mask), c)
        assert max(theirs.drop, theirs.gain) > 0.1
        for measure in MEASURES:
            assert ours[f"{region}-{measure}"] == pytest.approx(getattr(theirs, measure), abs=1e-6)


def test_target_that_fills_the_image() -> None:
    """The map inside the target is the map, outside it is zero, and the target hides nothing."""
    found = scores(NAMES + AVERAGES, EVERYWHERE)
    hidden = average_of_one(logits(X), logits(0 * X), 1)
    for measure in MEASURES:
        assert found[f"inside-{measure}"] == found[f"average-{measure}"]
        assert found[f"box-{measure}"] == pytest.approx(0, abs=1e-9)
        assert found[f"outside-{measure}"] == pytest.approx(getattr(hidden, measure))


def test_nine_metrics_share_three_rows() -> None:
    with running() as engine:
        job = submit(engine, model(), X, S, [1], [metric(name) for name in NAMES + AVERAGES])
        job.future.result(TIMEOUT_S)
    assert job.rows == 1 + 3 + 1


@pytest.mark.parametrize("name", NAMES)
def test_published_properties(name: str) -> None:
    entry = registry.METRICS[name]
    assert entry.needs_truth
    assert not entry.parameters
    assert entry.higher_is_better == (not name.endswith("drop"))
