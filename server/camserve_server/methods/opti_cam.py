"""Opti-CAM: Optimizing saliency maps for interpretability.

Zhang, Torres, Sicre, Avrithis, Ayache 2024, CVIU 248:104101, arXiv:2301.07002.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from camserve_server.plan import Ascend, Capture, Image, Plan, ReleaseRows, SaliencyMaps, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import resize, resize_minmax


def _rows(sizes: Sizes, *, steps: int = 100, **_: object) -> int:
    return 1 + steps * sizes.targets


@method(
    "opti-cam",
    title="Opti-CAM",
    paper="arXiv:2301.07002",
    rows=_rows,
    min_rows=lambda sizes, **_: 1 + sizes.targets,
)
def opti_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    steps: Annotated[int, Range(1, 10_000), "iterations of Adam; the official command line takes 50"] = 100,
    rate: Annotated[float, Range(1e-6, 100.0), "learning rate"] = 0.1,
    relu: Annotated[bool, "negative activations count as zero; the paper's text does not for transformers"] = True,
    norm: Annotated[
        Literal["range", "max", "sigmoid"],
        "how the map becomes a mask: range is n(·), max divides by the maximum, sigmoid is the sigmoid",
    ] = "range",
    mask_space: Annotated[
        Literal["raw", "normalised"],
        "what the mask multiplies: raw, pixels in [0, 1], so that the background is black, as in the official code; or "
        "the normalised image",
    ] = "raw",
    objective: Annotated[
        Literal["mask", "diff"], "the masked image's logit (eq. 10), or its nearness to the image's own (eq. 19)"
    ] = "mask",
    stop: Annotated[
        Literal["none", "official"], "official: end where, after a tenth of the steps, the objective has fallen"
    ] = "none",
) -> Plan[SaliencyMaps]:
    """A combination of activations, optimised so that the image masked by it has the highest logit.

    x [3, H, W], c [T] class indices → maps [T, h, w], unitless.

    Equations:
        S(u) = Σ_k softmax(u)_k A_k                                 (eq. 8)
        mask = n(up(S(u)))
        maximise y_c(image masked by it) over u, by Adam            (eq. 9, 10)
        map  = the mask of the last u

    All u start equal. The paper's own stopping rule practically never fires, so it is left out.

    Advice:
        Take it where the map shall show what the network needs to be sure. It is made for a high average gain, so that
        metric flatters it; it need not win at insertion and deletion. In float32 its iterates diverge: the official
        code differs from itself by up to 0.25 a pixel between one thread and two, while the objective hardly moves. So
        do not compare maps of two machines pixel by pixel; on one server they are the same, bit for bit.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    if relu:
        A = A.relu()
    pixels = x.tensor * x.std + x.mean

    def S(u: Tensor) -> Tensor:
        return torch.einsum("k,khw->hw", u.softmax(dim=0), A)  # eq. 8

    def masked(u: Tensor) -> Tensor:
        s = _NORMS[norm](S(u), x.size)
        return x.tensor * s if mask_space == "normalised" else (pixels * s - x.mean) / x.std

    def gain(t: int, y: Tensor) -> Tensor:
        return y[c.index[t]] if objective == "mask" else -(y[c.index[t]] - c.y[t].to(y.dtype)).abs()

    u, share = A.new_full((len(c), len(A)), 0.5), 1.0
    if (
        A.amin(dim=(1, 2)) < A.amax(dim=(1, 2))
    ).any():  # otherwise every combination is constant, and there is nothing to optimise
        stop_rule = partial(_fell, max(1, steps // 10)) if stop == "official" else None
        ascent = yield from Ascend(u, masked, gain, steps, rate, stop_rule, min_rows=len(c))  # eq. 9
        u = ascent.u
        done = sum(len(history) for history in ascent.history)
        share = 1.0 if all(ascent.ended) else done / (steps * len(c))
    else:
        yield from ReleaseRows(steps * len(c))
    return SaliencyMaps(torch.stack([S(u_t) for u_t in u]), _NORMS[norm], share)


def _fell(period: int, history: Sequence[float]) -> bool:
    """Whether this step is a `period`-th one and its objective lies below that of the one before."""
    step = len(history) - 1
    return step > 0 and step % period == 0 and history[step] < history[step - period]


def _by_max(S: Tensor, size: tuple[int, int]) -> Tensor:
    s = resize(S, size)
    return s / s.amax(dim=(-2, -1), keepdim=True)


def _by_sigmoid(S: Tensor, size: tuple[int, int]) -> Tensor:
    return resize(S, size).sigmoid()  # the official code writes it as ½(tanh(S/2) + 1)


_NORMS = {"range": resize_minmax, "max": _by_max, "sigmoid": _by_sigmoid}
