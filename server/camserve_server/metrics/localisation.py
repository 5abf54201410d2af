"""Localisation: agreement of the map and the location of the target, as in appendix B of the Opti-CAM paper.

Zhang et al. 2024, arXiv:2301.07002. Docstrings name the papers of the other metrics.

B_p is the box around the largest component of the pixels with S above its mean. The box of a constant map is the whole
image. Boxes are (left, top, right, bottom), x first. Maps and masks are [H, W], y first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from camserve_server.maps.boxes import area, largest_component_box, max_iou
from camserve_server.plan import Box, Image, MetricResult, OnHost, Plan, Score, Targets, Truth
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import Repeated

Map = NDArray[np.float64]

THRESHOLDS = tuple(i / 100 for i in range(100))
DELTAS = ("0.3", "0.5", "0.7")

IoU = Annotated[
    float, Range(0, 1), "Threshold: an IoU counts as 1 from this value on, and as 0 below. 0 uses the IoU itself."
]


def _finished(value: float, curve: tuple[float, ...] = ()) -> Plan[MetricResult]:
    """Plan of a metric without queries."""
    return MetricResult(value, curve)
    yield


def _none(sizes: Sizes, **_: object) -> int:
    return 0


def _one(sizes: Sizes) -> int:
    return 1


@metric("localisation-error", title="Localisation error", paper="arXiv:2301.07002", rows=_none, higher_is_better=False)
def localisation_error(x: Image, c: Targets, S: Tensor, *, iou: IoU = 0.0, truth: Truth) -> Plan[MetricResult]:
    """One minus the overlap of the map's box and the target's boxes, in [0, 1]: 1 − max IoU.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        iou: Threshold of the IoU.
        truth: Location of the target.

    Returns:
        LE of B_p and the best box of the target (appendix B), in [0, 1].
    """
    return _finished(1 - _overlap(S, truth, iou))


@metric("official-metric", title="Official metric", paper="arXiv:2301.07002", rows=_none, higher_is_better=False)
def official_metric(
    x: Image, c: Targets, S: Tensor, *, iou: IoU = 0.0, truth: Truth, predicted: int
) -> Plan[MetricResult]:
    """Localisation error, or 1 if the model does not predict the target class, in [0, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        iou: Threshold of the IoU.
        truth: Location of the target.
        predicted: Index of the class that the model predicts.

    Returns:
        OM = 1 − max IoU · 1[the predicted class is the target] (appendix B), in [0, 1].
    """
    return _finished(1 - _overlap(S, truth, iou) * (c.index[0] == predicted))


def _overlap(S: Tensor, truth: Truth, iou: float) -> float:
    """Return the highest IoU of B_p and a box of the target, or 1 or 0 if there is a threshold."""
    highest = max_iou(_box(_map(S)), truth.boxes)
    return float(highest >= iou) if iou else highest


@metric("pixel-f1", title="Pixel-wise F1", paper="arXiv:2301.07002", rows=_none, higher_is_better=True)
def pixel_f1(x: Image, c: Targets, S: Tensor, *, truth: Truth) -> Plan[MetricResult]:
    """Harmonic mean of the map's precision and recall for the pixels of the target, in [0, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        truth: Location of the target.

    Returns:
        F1 of precision = Σ S inside / Σ S and recall = Σ S inside / number of pixels inside (appendix B), in [0, 1]. It
        is 0 for a map of zeros.
    """
    values, inside = _map(S), truth.mask.numpy()
    # Equal to 2 · precision · recall / (precision + recall), without a division by zero.
    return _finished(float(2 * values[inside].sum() / (values.sum() + inside.sum())))


@metric(
    "energy-pointing-game",
    title="Energy-based pointing game",
    paper="arXiv:1910.01279",
    rows=_none,
    higher_is_better=True,
)
def energy_pointing_game(x: Image, c: Targets, S: Tensor, *, truth: Truth) -> Plan[MetricResult]:
    """Share of the map's mass inside the target, in [0, 1]: Σ S inside / Σ S.

    Score-CAM, Wang et al. 2020, arXiv:1910.01279.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        truth: Location of the target.

    Returns:
        The share, in [0, 1]. It is 0 for a map of zeros.
    """
    values = _map(S)
    inside, everywhere = values[truth.mask.numpy()].sum(), values.sum()
    return _finished(float(min(inside / everywhere, 1.0)) if everywhere > 0 else 0.0)


@metric("pointing-game", title="Pointing game", paper="arXiv:1608.00507", rows=_none, higher_is_better=True)
def pointing_game(
    x: Image, c: Targets, S: Tensor, *, tolerance: Annotated[int, Range(0, 100)] = 0, truth: Truth
) -> Plan[MetricResult]:
    """1 if the map's highest value lies inside the target, 0 if not.

    Excitation backprop, Zhang et al. 2018, arXiv:1608.00507.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        tolerance: Largest distance to the target in pixels that counts as a hit.
        truth: Location of the target.

    Returns:
        0 or 1. If several pixels have the highest value, the share of them that hit: the expected value for one of
        them, chosen at random.
    """
    values = _map(S)
    return _finished(float(_dilated(truth.mask.numpy(), tolerance)[values == values.max()].mean()))


def _dilated(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """Return the pixels [H, W] whose Euclidean distance to a pixel of the mask is at most `distance`."""
    H, W = mask.shape
    near = mask.copy()
    left = np.pad(mask.cumsum(axis=1), ((0, 0), (1, 0)))  # [H, W + 1]: pixels of the mask to the left of a column.
    columns = np.arange(W)
    for dy in range(-min(distance, H - 1), min(distance, H - 1) + 1):
        dx = math.isqrt(distance**2 - dy**2)
        wide = left[:, np.minimum(columns + dx + 1, W)] > left[:, np.maximum(columns - dx, 0)]
        near[max(dy, 0) : H + min(dy, 0)] |= wide[max(-dy, 0) : H + min(-dy, 0)]
    return near


@metric("box-accuracy", title="Box accuracy", paper="arXiv:2007.04178", rows=_none, higher_is_better=True)
def box_accuracy(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    iou: Literal["all", "0.3", "0.5", "0.7"] = "all",
    truth: Truth,
) -> Plan[MetricResult]:
    """1 if some threshold of the map gives a box with IoU ≥ δ, 0 if not, averaged over three δ.

    The curve contains max IoU(τ) of the box around the largest component of S ≥ τ, for τ = 0, 0.01 … 0.99. MaxBoxAccV2
    of many images uses one τ for all of them, so it can be computed from their curves. It is at most the mean of their
    values. Choe et al. 2020, arXiv:2007.04178.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        iou: Threshold δ from which a box is correct. all uses the mean over 0.3, 0.5 and 0.7.
        truth: Location of the target.

    Returns:
        The mean of 1[max over τ of max IoU(τ) ≥ δ], in [0, 1].
    """
    curve = yield from OnHost(partial(_overlaps, S, truth.boxes))
    deltas = DELTAS if iou == "all" else (iou,)
    return MetricResult(sum(max(curve) >= float(delta) for delta in deltas) / len(deltas), curve)


def _overlaps(S: Tensor, boxes: Sequence[Box]) -> tuple[float, ...]:
    """Return max IoU(τ) of each threshold. It takes about 25 ms for 224×224 pixels."""
    values = _map(S)
    return tuple(max_iou(largest_component_box(values >= threshold), boxes) for threshold in THRESHOLDS)


@metric("saliency-metric", title="Saliency metric", paper="arXiv:1705.07857", rows=_one, higher_is_better=False)
def saliency_metric(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """Logarithm of the area of the map's box minus that of the probability of its content, from log 0.05 up.

    The metric does not use the location of the target. Dabkowski, Gal 2017, arXiv:1705.07857.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].

    Returns:
        log max(0.05, |B_p| / H·W) − log p_c of the image cropped to B_p and resized to H×W, bicubic.
    """
    box = _box(_map(S))
    left, top, right, bottom = (int(side) for side in box)
    crop = F.interpolate(x.tensor[None, :, top:bottom, left:right], x.size, mode="bicubic", align_corners=False)[0]
    scores = yield from Score(Repeated(x.with_tensor(crop), 1), c)
    p = max(float(scores.probabilities[0, 0]), sys.float_info.min)  # The logarithm of 0 does not exist.
    return MetricResult(math.log(max(0.05, area(box) / S.numel())) - math.log(p))


def _map(S: Tensor) -> Map:
    """Return the map on the host in float64. Sums over 50,000 pixels would lose digits in float32."""
    values: Map = S.double().cpu().numpy()
    return values


def _box(values: Map) -> Box:
    """Return B_p."""
    # Rounding can move the mean of equal values, so constant maps are a separate case.
    return largest_component_box(
        values > values.mean() if values.min() < values.max() else np.ones_like(values, np.bool_)
    )
