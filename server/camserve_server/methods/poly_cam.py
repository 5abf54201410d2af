"""Poly-CAM: High resolution class activation map for convolutional neural networks.

Englebert, Cornu, De Vleeschouwer 2022, arXiv:2204.13359.

Masks depend neither on the class nor on the variant, so further targets take no rows. A channel that is zero everywhere
takes no row, because its weight multiplies a zero map. All constant channels share one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.maps.channels import SelectedChannels, have_equal_weights, report_equal_weights, select_channels
from camserve_server.plan import (
    Capture,
    Image,
    LeftOut,
    Level,
    MapWarning,
    Plan,
    ReleaseRows,
    Report,
    SaliencyMaps,
    Score,
    Scores,
    Targets,
)
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import Masked, Part, resize, resize_minmax

Variant = Annotated[
    Literal["paper", "official"],
    "official follows the code of the authors. Masks and maps are scaled before they are resized, from the 0.1th "
    "percentile and divided by the 99.9th. LNorm pools by bilinear resizing, which is far from the mean if the ratio "
    "of resolutions is 4 or odd. A second layer of the same resolution is a separate level.",
]
Tolerance = Annotated[
    float,
    Range(0, 1),
    "Leave out the weakest channels if together they change S_l by at most this fraction of its maximum, for any "
    "weights. 0 leaves out none.",
]
Weights = Callable[[Targets, Sequence[Tensor]], Tensor]
"""Function of the targets and the probabilities [K, T] of each part of the image that returns weights w [K, T]."""


def _rows(masks: int, sizes: Sizes, **_: object) -> int:
    return 1 + masks * sum(sizes.channels)


def _min_rows(masks: int, sizes: Sizes, **_: object) -> int:
    return 1 + masks


def _has_own_scaling(variant: str, **_: object) -> bool:
    return variant == "official"


def _increase(c: Targets, p: Sequence[Tensor]) -> Tensor:
    """Channel-wise Increase of Confidence, eq. 4 with f_c(X_b) = 0."""
    return p[0]


def _decrease(c: Targets, p: Sequence[Tensor]) -> Tensor:
    """Channel-wise Decrease of Confidence, eq. 5."""
    return (c.p - p[0]).relu()


def _variation(c: Targets, p: Sequence[Tensor]) -> Tensor:
    """Channel-wise Variation of Confidence, eq. 6."""
    return (c.p + p[0] - p[1]).relu()


@method(
    "poly-cam",
    title="Poly-CAM (PCAM±)",
    paper="arXiv:2204.13359",
    rows=partial(_rows, 2),
    min_rows=partial(_min_rows, 2),
    own_scaling=_has_own_scaling,
)
def poly_cam(
    x: Image, c: Targets, layers: Sequence[str], *, variant: Variant = "paper", tolerance: Tolerance = 0.0
) -> Plan[SaliencyMaps]:
    """High-resolution map from several layers; channels are weighted by the effect of revealing and of hiding them.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layers: Layers, fine to coarse, with the activations A_l [K_l, h_l, w_l].
        variant: Equations of the paper or code of the authors.
        tolerance: Largest change of S_l by channels that are left out, as a fraction of its maximum.

    Returns:
        Maps [T, h, w] at the resolution of the finest layer, unitless, ≥ 0.

    Equations:
        M_k = n(up(A_lk))
        w_k = relu(p_c(x) + p_c(x ⊙ M_k) − p_c(x ⊙ (1 − M_k)))      (eq. 6)
        S_l = relu(Σ_k w_k A_lk)                                    (eq. 2)
        P_L = S_L,  P_l = LNorm(S_l) ⊙ up(P_{l+1})                  (eq. 3)

        LNorm(S_l) = S_l / up(S_l averaged over blocks as large as a position of the next coarser layer) (eq. 1).

    Advice:
        Use it for maps that are fine and class-specific if seconds to minutes are acceptable. A stream returns each
        level when it is done, the coarsest first, so a caller can stop early. Masks do not depend on the class, so
        further classes take no rows. Most rows belong to the coarse layers, which have the most channels. It expects
        activations ≥ 0, as after a ReLU. If a layer has negative activations, the map gets a warning.
    """
    return (yield from _poly_cam(x, c, layers, ("revealed", "hidden"), _variation, 1 + c.p, variant, tolerance))


@method(
    "poly-cam+",
    title="Poly-CAM+ (PCAM+)",
    paper="arXiv:2204.13359",
    rows=partial(_rows, 1),
    min_rows=partial(_min_rows, 1),
    own_scaling=_has_own_scaling,
)
def poly_cam_plus(
    x: Image, c: Targets, layers: Sequence[str], *, variant: Variant = "paper", tolerance: Tolerance = 0.0
) -> Plan[SaliencyMaps]:
    """High-resolution map; each channel is weighted by the probability when only its region is visible.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layers: Layers, fine to coarse, with the activations A_l [K_l, h_l, w_l].
        variant: Equations of the paper or code of the authors.
        tolerance: Largest change of S_l by channels that are left out, as a fraction of its maximum.

    Returns:
        Maps [T, h, w] at the resolution of the finest layer, unitless, ≥ 0.

    Equations:
        M_k = n(up(A_lk))
        w_k = p_c(x ⊙ M_k)                                          (eq. 4)
        S_l = relu(Σ_k w_k A_lk)                                    (eq. 2)
        P_L = S_L,  P_l = LNorm(S_l) ⊙ up(P_{l+1})                  (eq. 3)

        LNorm(S_l) = S_l / up(S_l averaged over blocks as large as a position of the next coarser layer) (eq. 1).

    Advice:
        Use it if you can afford only half of the passes of PCAM±. It shows parts that are sufficient for the class. The
        score of the baseline image counts as zero.
    """
    return (yield from _poly_cam(x, c, layers, ("revealed",), _increase, torch.ones_like(c.p), variant, tolerance))


@method(
    "poly-cam-",
    title="Poly-CAM− (PCAM−)",
    paper="arXiv:2204.13359",
    rows=partial(_rows, 1),
    min_rows=partial(_min_rows, 1),
    own_scaling=_has_own_scaling,
)
def poly_cam_minus(
    x: Image, c: Targets, layers: Sequence[str], *, variant: Variant = "paper", tolerance: Tolerance = 0.0
) -> Plan[SaliencyMaps]:
    """High-resolution map; each channel is weighted by the decrease of the probability when its region is hidden.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layers: Layers, fine to coarse, with the activations A_l [K_l, h_l, w_l].
        variant: Equations of the paper or code of the authors.
        tolerance: Largest change of S_l by channels that are left out, as a fraction of its maximum.

    Returns:
        Maps [T, h, w] at the resolution of the finest layer, unitless, ≥ 0.

    Equations:
        M_k = n(up(A_lk))
        w_k = relu(p_c(x) − p_c(x ⊙ (1 − M_k)))                     (eq. 5)
        S_l = relu(Σ_k w_k A_lk)                                    (eq. 2)
        P_L = S_L,  P_l = LNorm(S_l) ⊙ up(P_{l+1})                  (eq. 3)

        LNorm(S_l) = S_l / up(S_l averaged over blocks as large as a position of the next coarser layer) (eq. 1).

    Advice:
        Use it to see parts that are necessary for the class. If hiding any single channel changes nothing, for example
        because the class is not in the image, the map is empty. The map of PCAM± is not.
    """
    return (yield from _poly_cam(x, c, layers, ("hidden",), _decrease, c.p, variant, tolerance))


def _poly_cam(
    x: Image,
    c: Targets,
    layers: Sequence[str],
    parts: Sequence[Part],
    weights: Weights,
    bound: Tensor,
    variant: str,
    tolerance: float,
) -> Plan[SaliencyMaps]:
    """Plan of all three methods. `bound` [T] is an upper bound of the weights."""
    A = yield from Capture(x, layers)  # fine to coarse, [K_l, h_l, w_l] each
    for name, A_l in zip(layers, A, strict=True):
        if A_l.min() < 0:
            yield from Report(MapWarning(f"layer {name} has negative activations; Poly-CAM expects none"))
    # In the paper's equations, a level of the same size as the coarser one adds nothing.
    levels = [
        l
        for l in reversed(range(len(layers)))
        if variant == "official" or l + 1 == len(layers) or A[l].shape[-2:] != A[l + 1].shape[-2:]
    ]
    selected = {l: select_channels(A[l], include_zero=False) for l in levels}
    yield from ReleaseRows(len(parts) * (sum(map(len, A)) - sum(map(len, selected.values()))))

    official = variant == "official"
    finish = _percentile if official else None
    P: Tensor | None = None
    share, left_out = 0.0, []
    equal = torch.ones(len(c), dtype=torch.bool, device=c.p.device)
    has_rows = False  # True after the first level with rows. A level with only zero channels has none.
    has_weights = False  # True after the first level with several weights that can be compared.
    for index, l in enumerate(levels):
        masked = Masked(x, A[l][selected[l].indices], _percentile if official else resize_minmax, parts)
        rule = None
        if tolerance and A[l].min() >= 0:
            rule = StoppingRule(selected[l].merge(A[l]), partial(weights, c), len(parts), bound, tolerance)
        w, done = yield from channel_weights(c, masked, selected[l], weights, 0 if has_rows else len(parts), rule)
        if has_rows and not done and len(selected[l]):  # Stopped early: the result is the map of the levels so far.
            break
        has_rows |= done > 0
        if done > 1:
            has_weights = True
            run = selected[l].indices[:done]
            equal &= have_equal_weights(w[run], A[l][run])
        if rule is not None and rule.error is not None and done < len(selected[l]):
            channels_left = len(selected[l]) - done
            left_out.append(LeftOut(layers[l], channels_left, len(parts) * channels_left, rule.error))
            done = len(selected[l])
        share += selected[l].share(done) / len(levels)
        S = torch.einsum("kt,khw->thw", w.to(A[l].dtype), A[l]).relu()  # eq. 2
        P = S if P is None else _lnorm(S, P.shape[-2:], official) * resize(P, (S.shape[-2], S.shape[-1]))  # eq. 3
        yield from Report(Level(index, len(levels), layers[l], SaliencyMaps(P, finish)))
    assert P is not None, "there is at least one layer"
    if has_weights:
        yield from report_equal_weights(c, equal)
    return SaliencyMaps(P, finish, share, tuple(left_out))


class StoppingRule:
    """Rule that sums S_l and stops when the remaining channels cannot change it by more than the tolerance.

    Activations and weights are not negative, so each channel can only raise S_l, and by no more than the bound of the
    weights times the channel's activations.
    """

    def __init__(
        self, A: Tensor, weights: Callable[[Sequence[Tensor]], Tensor], parts: int, bound: Tensor, tolerance: float
    ) -> None:
        """Prepare the sum.

        Args:
            A: Activations [n, h, w] in the order of the rows, ≥ 0.
            weights: Function of the probabilities of one channel that returns its weight.
            parts: Number of rows of each channel.
            bound: Upper bound of the weights [T].
            tolerance: Tolerance, as a fraction of the maximum of S_l.
        """
        self._A, self._weights, self._parts, self._tolerance = A, weights, parts, tolerance
        self._rows = bound.new_empty(0, len(bound))
        self._S = bound.new_zeros(len(bound), *A.shape[1:])
        # Upper bound of the sum of the remaining channels at any position after each channel, [T, n + 1].
        left = A.double().flip(0).cumsum(dim=0).amax(dim=(1, 2)).flip(0)
        self._left = bound[:, None] * torch.cat([left, left.new_zeros(1)])
        self.done = 0
        self.error: tuple[float, ...] | None = None

    def __call__(self, start: int, scores: Scores) -> bool:
        """Add finished rows and return True if no further rows are needed.

        The sum advances channel by channel, so the result does not depend on the batches.

        Args:
            start: Index of the first finished row.
            scores: Scores of the finished rows.

        Returns:
            True if the remaining channels cannot change S_l by more than the tolerance.
        """
        # A batch that failed in this function is run again.
        self._rows = torch.cat([self._rows[:start], scores.probabilities])
        while self.error is None and self._parts * (self.done + 1) <= len(self._rows):
            at = self._parts * self.done
            w = self._weights([self._rows[at + i : at + i + 1] for i in range(self._parts)])  # [1, T]
            self._S += w[0, :, None, None] * self._A[self.done]
            self.done += 1
            left, most = self._left[:, self.done], self._S.amax(dim=(1, 2))
            if (left <= self._tolerance * most).all():
                self.error = tuple((left / most.clamp(min=torch.finfo(most.dtype).tiny)).tolist())
        return self.error is not None


def channel_weights(
    c: Targets, masked: Masked, selected: SelectedChannels, weights: Weights, min_rows: int, rule: StoppingRule | None
) -> Plan[tuple[Tensor, int]]:
    """Plan of the channel weights of one level, by eq. 4, 5 or 6.

    Args:
        c: T target classes.
        masked: Masked images of the selected channels.
        selected: Selected channels.
        weights: Function that returns the weights of the probabilities.
        min_rows: Minimum number of rows.
        rule: Stopping rule, or None.

    Returns:
        The weights w [K, T] and the number of channels that were run.
    """
    if not len(masked):
        return c.p.new_zeros(len(selected.strength), len(c)), 0
    scores = yield from Score(masked, c, min_rows, rule)
    P = len(masked.parts)
    done = len(scores.probabilities) // P
    if rule is not None and rule.error is not None:
        done = rule.done  # The last batch may contain further rows.
    return selected.to_all_channels(weights(c, [scores.probabilities[i : P * done : P] for i in range(P)])), done


def _lnorm(S: Tensor, coarse: Sequence[int], official: bool) -> Tensor:
    """Divide S [T, h, w] by the mean of each block of h/coarse[0] × w/coarse[1] positions, eq. 1."""
    size = (coarse[0], coarse[1])
    means = resize(S, size) if official else F.adaptive_avg_pool2d(S, size)
    return S / resize(means, (S.shape[-2], S.shape[-1])).clamp(min=1e-12)


def _percentile(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale maps [..., h, w] to [0, 1] as the official code, by the 0.1th and 99.9th percentiles, then resize them."""
    flat = maps.flatten(-2)
    low = torch.quantile(flat, 0.001, dim=-1)[..., None, None]
    high = torch.quantile(flat, 0.999, dim=-1)[..., None, None]
    return resize(((maps - low) / high.clamp(min=1e-12)).clamp(0, 1), size)
