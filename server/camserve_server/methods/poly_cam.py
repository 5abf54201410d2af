"""Poly-CAM: High resolution class activation map for convolutional neural networks.

Englebert, Cornu, De Vleeschouwer 2022, arXiv:2204.13359.

Masks depend neither on the class nor on the variant, so more targets cost no further rows. A channel whose activation
is zero everywhere owes none: its weight multiplies a zero map. Channels that are constant share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.maps.channels import SelectedChannels, select_channels
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
    "official: as the authors' code. Masks and maps are scaled before they are resized, from the 0.1th percentile and "
    "divided by the 99.9th; LNorm pools by bilinear resizing, far from the mean where the ratio of resolutions is 4 or "
    "odd; a second layer of the same resolution is a level of its own",
]
Tolerance = Annotated[
    float,
    Range(0, 1),
    "leave out channels, the weakest first, that together move S_l by no more than this share of its maximum, whatever "
    "their weights are; 0: none",
]
Weights = Callable[[Targets, Sequence[Tensor]], Tensor]


def _rows(masks: int, sizes: Sizes, **_: object) -> int:
    return 1 + masks * sum(sizes.channels)


def _min_rows(masks: int, sizes: Sizes, **_: object) -> int:
    return 1 + masks


def _increase(c: Targets, p: Sequence[Tensor]) -> Tensor:
    """CIC, eq. 4 with f_c(X_b) = 0."""
    return p[0]


def _decrease(c: Targets, p: Sequence[Tensor]) -> Tensor:
    """CDC, eq. 5."""
    return (c.p - p[0]).relu()


def _variation(c: Targets, p: Sequence[Tensor]) -> Tensor:
    """CVC, eq. 6."""
    return (c.p + p[0] - p[1]).relu()


@method(
    "poly-cam",
    title="Poly-CAM (PCAM±)",
    paper="arXiv:2204.13359",
    rows=partial(_rows, 2),
    min_rows=partial(_min_rows, 2),
)
def poly_cam(
    x: Image, c: Targets, layers: Sequence[str], *, variant: Variant = "paper", tolerance: Tolerance = 0.0
) -> Plan[SaliencyMaps]:
    """High resolution from several layers; a channel counts by what revealing it adds and hiding it takes away.

    x [3, H, W], c [T] class indices, layers fine to coarse → maps [T, h, w] of the finest layer, unitless, ≥ 0.

    Equations:
        M_k = n(up(A_lk))
        w_k = relu(p_c(x) + p_c(x ⊙ M_k) − p_c(x ⊙ (1 − M_k)))      (eq. 6)
        S_l = relu(Σ_k w_k A_lk)                                    (eq. 2)
        P_L = S_L,  P_l = LNorm(S_l) ⊙ up(P_{l+1})                  (eq. 3)

    LNorm(S_l) = S_l / up(mean of S_l in each block as large as a place of the next coarser layer) (eq. 1).

    Advice:
        Take it for maps that are both fine and about the class, where seconds to minutes are no matter. Every level is
        streamed as it is done, the coarsest first, so a caller can stop early. Masks do not depend on the class, so
        further classes cost no rows; most rows are those of the coarse layers, which have the most channels. It expects
        activations that are nowhere negative, as after a ReLU; a layer that has negative ones gets a warning.
    """
    return (yield from _poly_cam(x, c, layers, ("revealed", "hidden"), _variation, 1 + c.p, variant, tolerance))


@method(
    "poly-cam+",
    title="Poly-CAM+ (PCAM+)",
    paper="arXiv:2204.13359",
    rows=partial(_rows, 1),
    min_rows=partial(_min_rows, 1),
)
def poly_cam_plus(
    x: Image, c: Targets, layers: Sequence[str], *, variant: Variant = "paper", tolerance: Tolerance = 0.0
) -> Plan[SaliencyMaps]:
    """High resolution from several layers; a channel counts by the class's probability when it alone is revealed.

    x [3, H, W], c [T] class indices, layers fine to coarse → maps [T, h, w] of the finest layer, unitless, ≥ 0.

    Equations:
        M_k = n(up(A_lk))
        w_k = p_c(x ⊙ M_k)                                          (eq. 4)
        S_l = relu(Σ_k w_k A_lk)                                    (eq. 2)
        P_L = S_L,  P_l = LNorm(S_l) ⊙ up(P_{l+1})                  (eq. 3)

    LNorm(S_l) = S_l / up(mean of S_l in each block as large as a place of the next coarser layer) (eq. 1).

    Advice:
        Take it where half of the passes of PCAM± must do. It shows what is enough for the class. The score of the
        baseline image is taken as zero.
    """
    return (yield from _poly_cam(x, c, layers, ("revealed",), _increase, torch.ones_like(c.p), variant, tolerance))


@method(
    "poly-cam-",
    title="Poly-CAM− (PCAM−)",
    paper="arXiv:2204.13359",
    rows=partial(_rows, 1),
    min_rows=partial(_min_rows, 1),
)
def poly_cam_minus(
    x: Image, c: Targets, layers: Sequence[str], *, variant: Variant = "paper", tolerance: Tolerance = 0.0
) -> Plan[SaliencyMaps]:
    """High resolution from several layers; a channel counts by how far the probability falls when it is hidden.

    x [3, H, W], c [T] class indices, layers fine to coarse → maps [T, h, w] of the finest layer, unitless, ≥ 0.

    Equations:
        M_k = n(up(A_lk))
        w_k = relu(p_c(x) − p_c(x ⊙ (1 − M_k)))                     (eq. 5)
        S_l = relu(Σ_k w_k A_lk)                                    (eq. 2)
        P_L = S_L,  P_l = LNorm(S_l) ⊙ up(P_{l+1})                  (eq. 3)

    LNorm(S_l) = S_l / up(mean of S_l in each block as large as a place of the next coarser layer) (eq. 1).

    Advice:
        Take it to see what the class cannot do without. Where hiding any one channel changes nothing, as with a class
        that is not in the picture, the map is empty; PCAM± is not.
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
    """`bound` [T] is the most that a weight can be."""
    A = yield from Capture(x, layers)  # fine to coarse, [K_l, h_l, w_l] each
    for name, A_l in zip(layers, A, strict=True):
        if A_l.min() < 0:
            yield from Report(MapWarning(f"layer {name} has negative activations, which Poly-CAM does not expect"))
    # A level of the coarser one's size adds nothing in the paper's equations.
    levels = [
        l
        for l in reversed(range(len(layers)))
        if variant == "official" or l + 1 == len(layers) or A[l].shape[-2:] != A[l + 1].shape[-2:]
    ]
    run = {l: select_channels(A[l], dead=False) for l in levels}
    yield from ReleaseRows(len(parts) * (sum(map(len, A)) - sum(map(len, run.values()))))

    official = variant == "official"
    finish = _percentile if official else None
    P: Tensor | None = None
    share, left_out = 0.0, []
    begun = False  # a level of nothing but dead channels has no rows
    for index, l in enumerate(levels):
        masked = Masked(x, A[l][run[l].indices], _percentile if official else resize_minmax, parts)
        negligible = None
        if tolerance and A[l].min() >= 0:
            negligible = _Negligible(run[l].merge(A[l]), partial(weights, c), len(parts), bound, tolerance)
        w, done = yield from _channel_weights(c, masked, run[l], weights, 0 if begun else len(parts), negligible)
        if begun and done < len(run[l]) and not done:  # cut short: the levels so far are the map
            break
        begun |= done > 0
        if negligible is not None and negligible.error is not None and done < len(run[l]):
            channels_left = len(run[l]) - done
            left_out.append(LeftOut(layers[l], channels_left, len(parts) * channels_left, negligible.error))
            done = len(run[l])
        share += run[l].share(done) / len(levels)
        S = torch.einsum("kt,khw->thw", w.to(A[l].dtype), A[l]).relu()  # eq. 2
        P = S if P is None else _lnorm(S, P.shape[-2:], official) * resize(P, (S.shape[-2], S.shape[-1]))  # eq. 3
        yield from Report(Level(index, len(levels), layers[l], SaliencyMaps(P, finish)))
    assert P is not None, "there is at least one layer"
    return SaliencyMaps(P, finish, share, tuple(left_out))


class _Negligible:
    """Sums S_l up as its weights come in, and tells when the channels to come can no longer matter.

    Activations and weights are nowhere negative, so S_l only grows, and by no more than the bound of the weights times
    what is left of the activations.
    """

    def __init__(
        self, A: Tensor, weights: Callable[[Sequence[Tensor]], Tensor], parts: int, bound: Tensor, tolerance: float
    ) -> None:
        """A [n, h, w], the channels in the order in which they come; bound [T]."""
        self._A, self._weights, self._parts, self._tolerance = A, weights, parts, tolerance
        self._rows = bound.new_empty(0, len(bound))
        self._S = bound.new_zeros(len(bound), *A.shape[1:])
        # After n channels: the most that all further ones can add to any position, [T, n + 1].
        left = A.double().flip(0).cumsum(dim=0).amax(dim=(1, 2)).flip(0)
        self._left = bound[:, None] * torch.cat([left, left.new_zeros(1)])
        self.done = 0
        self.error: tuple[float, ...] | None = None

    def __call__(self, start: int, scores: Scores) -> bool:
        """Whether it is enough. Channel by channel, so that it does not matter how rows come in batches."""
        self._rows = torch.cat([self._rows, scores.probabilities])
        while self.error is None and self._parts * (self.done + 1) <= len(self._rows):
            at = self._parts * self.done
            w = self._weights([self._rows[at + i : at + i + 1] for i in range(self._parts)])  # [1, T]
            self._S += w[0, :, None, None] * self._A[self.done]
            self.done += 1
            left, most = self._left[:, self.done], self._S.amax(dim=(1, 2))
            if (left <= self._tolerance * most).all():
                self.error = tuple((left / most.clamp(min=torch.finfo(most.dtype).tiny)).tolist())
        return self.error is not None


def _channel_weights(
    c: Targets, masked: Masked, run: SelectedChannels, weights: Weights, least: int, negligible: _Negligible | None
) -> Plan[tuple[Tensor, int]]:
    """w [K, T] of the channels of one level, by eq. 4, 5 or 6, and how many of those to be run were."""
    if not len(masked):
        return c.p.new_zeros(len(run.strength), len(c)), 0
    scores = yield from Score(masked, c, least, negligible)
    P = len(masked.parts)
    done = len(scores.probabilities) // P
    if negligible is not None and negligible.error is not None:
        done = negligible.done  # the last batch may have had more
    return run.to_all_channels(weights(c, [scores.probabilities[i : P * done : P] for i in range(P)])), done


def _lnorm(S: Tensor, coarse: Sequence[int], official: bool) -> Tensor:
    """Local normalisation to the mean of each block, eq. 1; S [T, h, w], blocks of h/coarse[0] × w/coarse[1]."""
    size = (coarse[0], coarse[1])
    means = resize(S, size) if official else F.adaptive_avg_pool2d(S, size)
    return S / resize(means, (S.shape[-2], S.shape[-1])).clamp(min=1e-12)


def _percentile(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The official code's scaling of [..., h, w] to [0, 1], then resized: from the 0.1th percentile, by the 99.9th."""
    flat = maps.flatten(-2)
    low = torch.quantile(flat, 0.001, dim=-1)[..., None, None]
    high = torch.quantile(flat, 0.999, dim=-1)[..., None, None]
    return resize(((maps - low) / high.clamp(min=1e-12)).clamp(0, 1), size)
