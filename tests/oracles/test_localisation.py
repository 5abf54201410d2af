"""Localisation metrics: simple cases, random maps against the oracle, and ground truth in requests."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

import camserve
from camserve_server import registry
from camserve_server.maps import boxes
from camserve_server.models.model import Model
from camserve_server.plan import Box, MetricResult, Truth
from camserve_server.service.server import Server
from tests import nets
from tests.oracles import localisation as oracle
from tests.support import TIMEOUT_S, as_model, explained, metric, noise, running, submit

H, W = SIZE = (37, 29)
X = noise(3, *SIZE).double()
C = 3


@cache
def model() -> Model:
    return as_model(nets.tiny_cnn(), SIZE, dtype=torch.float64)


def likeliest() -> int:
    return int(model().module(X[None])[0].argmax())


def measured(name: str, S: Tensor, truth: Truth | None = None, c: int = C, **parameters: Any) -> MetricResult:
    return explained(model(), X, S, [c], [metric(name, **parameters)], truth=truth).scores[0][0]


def score(name: str, S: Tensor, truth: Truth | None = None, **parameters: Any) -> float:
    return measured(name, S, truth, **parameters).value


def at(*located: Box) -> Truth:
    return boxes.make_truth(located, None, SIZE)


def filled(*located: Box, value: float = 1.0) -> Tensor:
    S = torch.zeros(SIZE)
    for left, top, right, bottom in located:
        S[int(top) : int(bottom), int(left) : int(right)] = value
    return S


WIDE = (2.0, 5.0, 26.0, 11.0)  # 24×6 pixels, without any symmetry.
PERFECT = {
    "localisation-error": 0,
    "pixel-f1": 1,
    "energy-pointing-game": 1,
    "pointing-game": 1,
    "box-accuracy": 1,
}


# ---- simple cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PERFECT)
def test_map_equal_to_the_box_is_perfect_only_for_that_box(name: str) -> None:
    assert score(name, filled(WIDE), at(WIDE)) == PERFECT[name]
    elsewhere = (2.0, 20.0, 26.0, 26.0)
    worst = 1 - PERFECT[name]
    # The box of the lowest threshold is the whole image.
    assert score(name, filled(WIDE), at(elsewhere)) == worst


@pytest.mark.parametrize("name", PERFECT)
def test_x_and_y_are_not_swapped(name: str) -> None:
    """The test compares a box with the same box after a swap of x and y."""
    left, top, right, bottom = WIDE
    assert score(name, filled((top, left, bottom, right)), at((top, left, bottom, right))) == PERFECT[name]
    assert score(name, filled(WIDE), at((top, left, bottom, right))) != PERFECT[name]


def test_box_with_half_overlap() -> None:
    truth = at((14.0, 5.0, 26.0, 11.0))  # The right half.
    assert score("localisation-error", filled(WIDE), truth) == pytest.approx(1 / 2)
    assert score("localisation-error", filled(WIDE), at((2.0, 8.0, 26.0, 14.0))) == pytest.approx(2 / 3)
    assert score("energy-pointing-game", filled(WIDE), truth) == pytest.approx(1 / 2)
    assert score("pixel-f1", filled(WIDE), truth) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert score("pixel-f1", filled(WIDE, value=0.5), at(WIDE)) == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score("pointing-game", filled(WIDE), truth) == 0.5, "half of the pixels with the highest value hit"


@pytest.mark.parametrize(("iou", "right"), [(0.5, True), (0.51, False)])
def test_threshold_decides_if_a_box_is_correct(iou: float, right: bool) -> None:
    half = at((14.0, 5.0, 26.0, 11.0))
    assert score("localisation-error", filled(WIDE), half, iou=iou) == (not right)


def test_official_metric_requires_the_predicted_class() -> None:
    half = at((14.0, 5.0, 26.0, 11.0))
    best, other = likeliest(), (likeliest() + 1) % 7
    assert measured("official-metric", filled(WIDE), half, c=best).value == pytest.approx(1 / 2)
    assert measured("official-metric", filled(WIDE), half, c=other).value == 1
    assert measured("official-metric", filled(WIDE), half, c=other, iou=0.3).value == 1


def test_largest_component_and_best_box_count() -> None:
    small = (20.0, 30.0, 24.0, 34.0)
    both = filled(WIDE, small)
    assert score("localisation-error", both, at(WIDE)) == 0
    assert score("localisation-error", both, at(small)) == 1
    assert score("localisation-error", both, at(small, WIDE)) == 0
    assert score("pixel-f1", both, at(small, WIDE)) == 1


def test_components_do_not_connect_at_corners() -> None:
    touching = filled((2.0, 5.0, 10.0, 11.0), (10.0, 11.0, 14.0, 15.0))
    assert score("localisation-error", touching, at((2.0, 5.0, 10.0, 11.0))) == 0


def test_ring_has_the_box_of_its_outside() -> None:
    """The box of a map includes its hole. The hole of a mask does not belong to the target."""
    ring = filled((4.0, 6.0, 24.0, 30.0)) - filled((8.0, 10.0, 20.0, 26.0))
    truth = boxes.make_truth((), ring.bool().numpy(), SIZE)
    assert truth.boxes == ((4.0, 6.0, 24.0, 30.0),)
    assert score("localisation-error", ring, truth) == 0
    assert score("pixel-f1", ring, truth) == score("energy-pointing-game", ring, truth) == 1
    middle = filled((12.0, 14.0, 14.0, 16.0))
    assert score("pointing-game", middle, truth) == score("energy-pointing-game", middle, truth) == 0


def test_pointing_game_with_a_tolerance() -> None:
    one = filled((20.0, 10.0, 21.0, 11.0))  # Three pixels to the right of the box, and four below.
    truth = at((10.0, 2.0, 18.0, 7.0))
    assert [score("pointing-game", one, truth, tolerance=t) for t in (0, 4, 5, 100)] == [0, 0, 1, 1]


def test_box_of_a_constant_map_is_the_whole_image() -> None:
    for value in (0.0, 0.7, 1.0):
        S = torch.full(SIZE, value)
        assert score("localisation-error", S, at((0.0, 0.0, W / 2, H))) == pytest.approx(1 / 2)
        p = float(model().module(X[None]).softmax(dim=1)[0, C])
        assert score("saliency-metric", S) == pytest.approx(-math.log(p), abs=1e-6)


@pytest.mark.slow
def test_box_accuracy_at_one_overlap() -> None:
    truth = at((8.0, 5.0, 26.0, 11.0))  # 18 of 24 columns: IoU ¾.
    found = [score("box-accuracy", filled(WIDE), truth, iou=iou) for iou in ("0.3", "0.5", "0.7", "all")]
    assert found == [1, 1, 1, 1]
    truth = at((12.0, 5.0, 26.0, 11.0))  # 14 of 24 columns.
    found = [score("box-accuracy", filled(WIDE), truth, iou=iou) for iou in ("0.3", "0.5", "0.7", "all")]
    assert found == [1, 1, 0, 2 / 3]
    curve = measured("box-accuracy", filled(WIDE), truth).curve
    assert curve == pytest.approx([14 * 6 / (H * W)] + 99 * [14 / 24])


def test_saliency_metric_uses_the_content_of_the_box() -> None:
    for box, share in ((WIDE, 24 * 6 / (H * W)), ((2.0, 5.0, 4.0, 7.0), 0.05)):
        left, top, right, bottom = (int(side) for side in box)
        crop = F.interpolate(X[None, :, top:bottom, left:right], SIZE, mode="bicubic", align_corners=False)
        p = float(model().module(crop).softmax(dim=1)[0, C])
        assert score("saliency-metric", filled(box)) == pytest.approx(math.log(share) - math.log(p), abs=1e-6)


def needs_truth(metrics: Iterable[registry.Metric | camserve.Metric]) -> set[str]:
    """Return the names of metrics with ground truth, except those of the box study."""
    study = ("-drop", "-increase", "-gain")
    return {metric.name for metric in metrics if metric.needs_truth and not metric.name.endswith(study)}


def test_only_the_saliency_metric_needs_a_row() -> None:
    names = [*NAMES, "official-metric", "box-accuracy", "energy-pointing-game"]
    assert set(names) == needs_truth(registry.METRICS.values())
    with running() as engine:
        job = submit(engine, model(), X, filled(WIDE), [C], [metric(name) for name in (*names, "saliency-metric")])
        job.future.result(TIMEOUT_S)
    assert job.rows == 1 + 1


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_maps_agree_with_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    grid = torch.from_numpy(random.random((1, 1, 6, 5)) ** 2)
    S = F.interpolate(grid, SIZE, mode="bilinear")[0, 0].float() if seed % 2 else noise(*SIZE, seed=seed).sigmoid()
    located = []
    for _ in range(1 + seed % 3):
        (left, right), (top, bottom) = np.sort(random.choice(6 * W, 2)) / 6, np.sort(random.choice(6 * H, 2)) / 6
        located.append((float(left), float(top), float(right) + 1 / 6, float(bottom) + 1 / 6))
    truth, values = at(*located), S.double().numpy()
    mask = truth.mask.numpy()
    near = pytest.approx
    assert score("localisation-error", S, truth) == near(oracle.localisation_error(values, located))
    assert score("pixel-f1", S, truth) == near(oracle.pixel_f1(values, mask))
    assert score("energy-pointing-game", S, truth) == near(oracle.energy(values, mask))
    for tolerance in (0, 1, 7, 15):
        hit = oracle.pointing_game(values, mask, tolerance)
        assert score("pointing-game", S, truth, tolerance=tolerance) == hit


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_box_accuracy_agrees_with_the_oracle_at_every_threshold(seed: int) -> None:
    S = F.interpolate(noise(1, 1, 3, 4, seed=seed).sigmoid(), (8, 9), mode="bilinear")[0, 0]
    tiny = as_model(nets.tiny_cnn(), (8, 9))
    truth = boxes.make_truth([(1.5, 2.0, 7.0, 6.5)], None, (8, 9))
    found = explained(tiny, noise(3, 8, 9), S, [C], [metric("box-accuracy")], truth=truth).scores[0][0]
    value, curve = oracle.box_accuracy(S.double().numpy(), truth.boxes, (0.3, 0.5, 0.7))
    assert found.value == pytest.approx(value)
    assert found.curve == pytest.approx(curve)


def test_largest_component_agrees_with_scipy() -> None:
    random = np.random.default_rng(0)
    for _ in range(500):
        height, width = random.integers(1, 40, 2)
        mask = random.random((height, width)) < random.random()
        labels, count = scipy.ndimage.label(mask)
        rows, columns = np.where(labels == 1 + np.bincount(labels.ravel(), minlength=2)[1:].argmax())
        expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if count else (0, 0, 0, 0)
        assert boxes.largest_component_box(mask) == expected


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0.0, 0.0, 29.0, 37.0), range(37), range(29)),
        ((1.5, 2.4, 3.5, 4.6), range(2, 5), range(1, 3)),
        ((3.6, 4.6, 3.7, 4.7), range(5, 6), range(4, 5)),
        ((28.9, 36.9, 29.0, 37.0), range(36, 37), range(28, 29)),
    ],
)
def test_box_covers_pixels_by_their_centres(box: Box, rows: range, columns: range) -> None:
    found = at(box).mask.nonzero().tolist()
    assert found == [[y, x] for y in rows for x in columns]


# ---- requests --------------------------------------------------------------------------------------------------------

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
LEFT = np.zeros((32, 32), np.float32)
LEFT[8:24, 0:16] = 1  # In the photograph: x from 0 to 30, y from 10 to 30.
NAMES = ["localisation-error", "pixel-f1", "pointing-game"]


def encoded(image: np.ndarray, orientation: int) -> bytes:
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(image).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_boxes_are_in_pixels_of_the_original_image(server: Server) -> None:
    sideways = encoded(np.ascontiguousarray(np.rot90(PHOTO)), 6)  # EXIF: rotate by 90° clockwise.
    tensor = np.zeros((3, 32, 32), np.float32)
    with camserve.Client(server.address) as client:

        def scores(image: Any, **truth: Any) -> list[float]:
            return [
                *client.evaluate(image, model="tiny", saliency=LEFT, metrics=NAMES, target=1, **truth).scores.values()
            ]

        for image in (PHOTO, PIL.Image.fromarray(PHOTO), encoded(PHOTO, 1), sideways):
            assert scores(image, boxes=(0, 10, 30, 30)) == pytest.approx([0, 1, 1])
            assert scores(image, boxes=[(30, 10, 60, 30)]) == [1, 0, 0]
            assert scores(image, boxes=[(30, 10, 60, 30), (0, 10, 30, 30)])[0] == pytest.approx(0)
        assert scores(tensor, boxes=(0, 8, 16, 24)) == [0, 1, 1]
        assert scores(PHOTO, mask=LEFT) == scores(PHOTO, mask=LEFT > 0) == [0, 1, 1]
        photographs = np.zeros((40, 60), bool)
        photographs[10:30, 0:30] = True
        assert scores(PHOTO, mask=photographs) == [0, 1, 1]
        both = scores(PHOTO, mask=photographs, boxes=(30, 10, 60, 30))
        assert both == [1, 1, 1], "overlap uses the boxes, mass uses the mask"


def test_metrics_publish_that_they_need_ground_truth(server: Server) -> None:
    with camserve.Client(server.address) as client:
        needy = needs_truth(client.metrics())
        assert needy == {*NAMES, "official-metric", "box-accuracy", "energy-pointing-game"}
        e = client.explain(
            PHOTO, model="tiny", method="grad-cam", target=[1, 2], metrics=sorted(needy), boxes=(5, 5, 50, 30)
        )
        assert all(set(each.scores) == needy for each in e.maps)
        assert len(e.curves["box-accuracy"]) == 100


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({}, "truth"),
        ({"boxes": []}, "truth.boxes"),
        ({"boxes": (1, 2, 3)}, "truth.boxes"),
        ({"boxes": [(0, 0, 9, 9), (0, 0, 61, 40)]}, "truth.boxes[1]"),
        ({"boxes": (9, 0, 9, 9)}, "truth.boxes[0]"),
        ({"boxes": (0, float("nan"), 9, 9)}, "truth.boxes[0]"),
        ({"mask": LEFT[None]}, "truth.mask"),
        ({"mask": LEFT * 255}, "truth.mask.data"),
        ({"mask": LEFT * 0}, "truth.mask.data"),
        ({"mask": LEFT * np.nan}, "truth.mask.data"),
        ({"boxes": [(0, 0, 9, 9)] * 257}, "truth.boxes"),
    ],
)
def test_invalid_ground_truth_is_refused(server: Server, wrong: dict[str, Any], field: str) -> None:
    with camserve.Client(server.address) as client:
        for request in (client.explain, client.evaluate):
            with pytest.raises(camserve.InvalidArgument) as caught:
                request(PHOTO, model="tiny", method="grad-cam", metrics=["pixel-f1"], **wrong)
            assert caught.value.field == field
        assert client.explain(PHOTO, model="tiny", method="grad-cam").maps
