"""Localisation: does the map lie where the target is? As Opti-CAM's appendix B measures it.

Zhang et al. 2024, arXiv:2301.07002. The papers that the other metrics are from are named with them.

B_p is the box around the largest component of the pixels with S above its mean; a map that is constant singles nothing
out, and its box is the whole image. Boxes are (left, top, right, bottom), x first; maps and masks are [H, W], y first.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from camserve_server.maps.boxes import area, largest_component_box, max_iou
from camserve_server.plan import Box, Image, MetricResult, Plan, Score, Targets, Truth
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import Repeated

Map = NDArray[np.float64]

THRESHOLDS = tuple(i / 100 for i in range(100))
DELTAS = ("0.3", "0.5", "0.7")

IoU = Annotated[float, Range(0, 1), "from which IoU on a box counts, as 1, and below it as 0; 0: the IoU itself counts"]


def _done(value: float, curve: tuple[float, ...] = ()) -> Plan[MetricResult]:
    """The plan of a metric that has nothing to ask the model."""
    return MetricResult(value, curve)
    yield


def _none(sizes: Sizes, **_: object) -> int:
    return 0


def _one(sizes: Sizes) -> int:
    return 1


@metric("localisation-error", title="Localisation error", paper="arXiv:2301.07002", rows=_none, higher_is_better=False)
def localisation_error(x: Image, c: Targets, S: Tensor, *, iou: IoU = 0.0, truth: Truth) -> Plan[MetricResult]:
    """How little the map's box overlaps with the box of the target, in [0, 1]: 1 − max IoU.

    x [3, H, W], one class, S [H, W] in [0, 1]. LE, of B_p and each box of the target.
    """
    return _done(1 - _right(S, truth, iou))


@metric("official-metric", title="Official metric", paper="arXiv:2301.07002", rows=_none, higher_is_better=False)
def official_metric(
    x: Image, c: Targets, S: Tensor, *, iou: IoU = 0.0, truth: Truth, predicted: int
) -> Plan[MetricResult]:
    """The localisation error, and 1 where the model predicts another class than the target, in [0, 1].

    x [3, H, W], one class, S [H, W] in [0, 1]. OM = 1 − max IoU · 1[the likeliest class is the target].
    """
    return _done(1 - _right(S, truth, iou) * (c.index[0] == predicted))


def _right(S: Tensor, truth: Truth, iou: float) -> float:
    most = max_iou(_box(_map(S)), truth.boxes)
    return float(most >= iou) if iou else most


@metric("pixel-f1", title="Pixel-wise F1", paper="arXiv:2301.07002", rows=_none, higher_is_better=True)
def pixel_f1(x: Image, c: Targets, S: Tensor, *, truth: Truth) -> Plan[MetricResult]:
    """Harmonic mean of the map's share inside the target and the target's share that it fills, in [0, 1].

    x [3, H, W], one class, S [H, W] in [0, 1]. F1 of precision = Σ S inside / Σ S and recall = Σ S inside / pixels
    inside; 0 for a map of zeros.
    """
    values, inside = _map(S), truth.mask.numpy()
    # 2 · precision · recall / (precision + recall), without a division by zero.
    return _done(float(2 * values[inside].sum() / (values.sum() + inside.sum())))


@metric(
    "energy-pointing-game",
    title="Energy-based pointing game",
    paper="arXiv:1910.01279",
    rows=_none,
    higher_is_better=True,
)
def energy_pointing_game(x: Image, c: Targets, S: Tensor, *, truth: Truth) -> Plan[MetricResult]:
    """Share of the map's mass that lies inside the target, in [0, 1]: Σ S inside / Σ S.

    x [3, H, W], one class, S [H, W] in [0, 1]; 0 for a map of zeros. Score-CAM, Wang et al. 2020, arXiv:1910.01279.
    """
    values = _map(S)
    inside, everywhere = values[truth.mask.numpy()].sum(), values.sum()
    return _done(float(min(inside / everywhere, 1.0)) if everywhere > 0 else 0.0)


@metric("pointing-game", title="Pointing game", paper="arXiv:1608.00507", rows=_none, higher_is_better=True)
def pointing_game(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    tolerance: Annotated[int, Range(0, 100), "how many pixels away from the target still hits it"] = 0,
    truth: Truth,
) -> Plan[MetricResult]:
    """1 where the map's highest value lies inside the target, 0 elsewhere.

    x [3, H, W], one class, S [H, W] in [0, 1]. Where several pixels have the highest value, the share of them that hit:
    what one of them, taken by chance, would give on average. Excitation backprop, Zhang et al. 2018, arXiv:1608.00507.
    """
    values = _map(S)
    return _done(float(_near(truth.mask.numpy(), tolerance)[values == values.max()].mean()))


def _near(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """The pixels [H, W] that are at most `distance` pixels away from one of the mask, as the crow flies."""
    H, W = mask.shape
    near = mask.copy()
    before = np.pad(mask.cumsum(axis=1), ((0, 0), (1, 0)))  # [H, W + 1]: pixels of the mask to the left of a column
    at = np.arange(W)
    for dy in range(-min(distance, H - 1), min(distance, H - 1) + 1):
        dx = math.isqrt(distance**2 - dy**2)
        wide = before[:, np.minimum(at + dx + 1, W)] > before[:, np.maximum(at - dx, 0)]
        near[max(dy, 0) : H + min(dy, 0)] |= wide[max(-dy, 0) : H + min(-dy, 0)]
    return near


@metric("box-accuracy", title="Box accuracy", paper="arXiv:2007.04178", rows=_none, higher_is_better=True)
def box_accuracy(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    iou: Annotated[
        Literal["all", "0.3", "0.5", "0.7"], "from which IoU δ on a box is right; all: the mean of the three"
    ] = "all",
    truth: Truth,
) -> Plan[MetricResult]:
    """Whether some threshold of the map gives a box that is right: IoU ≥ δ, the mean over three δ, in [0, 1].

    x [3, H, W], one class, S [H, W] in [0, 1]. The curve has max IoU(τ) of the box around the largest component of
    S ≥ τ, for τ = 0, 0.01 … 0.99; the value is the mean of 1[max over τ of it ≥ δ]. MaxBoxAccV2 of many images takes
    one τ for all of them, and is had from their curves: it is at most the mean of the values. Choe et al. 2020,
    arXiv:2007.04178.
    """
    values = _map(S)
    curve = tuple(max_iou(largest_component_box(values >= threshold), truth.boxes) for threshold in THRESHOLDS)
    deltas = DELTAS if iou == "all" else (iou,)
    return _done(sum(max(curve) >= float(delta) for delta in deltas) / len(deltas), curve)


@metric("saliency-metric", title="Saliency metric", paper="arXiv:1705.07857", rows=_one, higher_is_better=False)
def saliency_metric(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """How small the map's box is, and how sure the model is of what is in it, from log 0.05 up.

    x [3, H, W], one class, S [H, W] in [0, 1]. log max(0.05, |B_p| / H·W) − log p_c of the image cropped to B_p and
    resized to H×W, bicubic. It knows nothing of where the target is. Dabkowski, Gal 2017, arXiv:1705.07857.
    """
    box = _box(_map(S))
    left, top, right, bottom = (int(side) for side in box)
    crop = F.interpolate(x.tensor[None, :, top:bottom, left:right], x.size, mode="bicubic", align_corners=False)[0]
    scores = yield from Score(Repeated(replace(x, tensor=crop), 1), c)
    p = max(float(scores.probabilities[0, 0]), sys.float_info.min)  # 0 has no logarithm
    return MetricResult(math.log(max(0.05, area(box) / S.numel())) - math.log(p))


def _map(S: Tensor) -> Map:
    """On the host, in float64: sums over 50,000 pixels lose digits in float32."""
    values: Map = S.double().cpu().numpy()
    return values


def _box(values: Map) -> Box:
    """B_p."""
    # The mean of equal values may be off by its rounding.
    return largest_component_box(
        values > values.mean() if values.min() < values.max() else np.ones_like(values, np.bool_)
    )
