"""Opti-CAM: Optimizing saliency maps for interpretability.

Zhang, Torres, Sicre, Avrithis, Ayache 2024, CVIU 248:104101, arXiv:2301.07002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from camserve_server.maps.channels import have_equal_weights, report_equal_weights
from camserve_server.plan import Ascend, Capture, Image, Plan, ReleaseRows, Resize, SaliencyMaps, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import resize, resize_minmax, to_device

Norm = Literal["range", "max", "sigmoid"]
MaskSpace = Literal["raw", "normalised"]
Objective = Literal["mask", "diff"]


def _rows(sizes: Sizes, *, steps: int = 100, **_: object) -> int:
    return 1 + steps * sizes.targets


@method(
    "opti-cam",
    title="Opti-CAM",
    paper="arXiv:2301.07002",
    rows=_rows,
    min_rows=lambda sizes, **_: 1 + sizes.targets,
    own_scaling=lambda norm, **_: norm != "range",
    passes="ascend",
)
def opti_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    steps: Annotated[int, Range(1, 10_000)] = 100,
    rate: Annotated[float, Range(1e-6, 100.0)] = 0.1,
    relu: bool = True,
    norm: Norm = "range",
    mask_space: MaskSpace = "raw",
    objective: Objective = "mask",
    stop: Literal["none", "official"] = "none",
) -> Plan[SaliencyMaps]:
    """Combination of activations, optimised so that the image under its mask has the highest logit.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        steps: Number of iterations of Adam. The official command line uses 50.
        rate: Learning rate.
        relu: Set negative activations to zero. The text of the paper keeps them for transformers.
        norm: Function that makes a mask of the map: range is n(·), max divides by the maximum, sigmoid is the sigmoid.
        mask_space: Image that the mask multiplies. raw: the pixels in [0, 1], so that the background is black, as in
            the official code. normalised: the normalised image.
        objective: Objective of the ascent. mask: the logit of the masked image (eq. 10). diff: the negative distance
            between this logit and that of the image (eq. 19).
        stop: Stopping rule. official: compare the objective after every tenth of the steps, and end if it has fallen.

    Returns:
        Maps [T, h, w], unitless.

    Equations:
        S(u) = Σ_k softmax(u)_k A_k                                 (eq. 8)
        mask = n(up(S(u)))
        maximise y_c(image masked by it) over u, by Adam            (eq. 9, 10)
        map  = the mask of the last u

        All u start equal. The paper's own stopping rule practically never applies, so it is left out.

    Advice:
        Use it to see which parts the network needs for a high score. Its objective is similar to average gain, so
        this metric favours it, but it need not be the best at insertion and deletion. Its iterates diverge in float32:
        the official code differs from itself by up to 0.25 per pixel between one thread and two, although the objective
        hardly changes. Therefore do not compare maps of two machines pixel by pixel. On a CPU, one server gives bitwise
        identical maps.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    if relu:
        A = A.relu()
    u, share = A.new_full((len(c), len(A)), 0.5), 1.0
    # If all channels are constant, every combination is constant, and there is nothing to optimise.
    if (A.amin(dim=(1, 2)) < A.amax(dim=(1, 2))).any():
        period = max(1, steps // 10)
        stop_rule = partial(_has_fallen, period) if stop == "official" else None
        image = x.tensor if mask_space == "normalised" else x.tensor * x.std + x.mean
        As, images, means, stds = (each.expand(len(c), *each.shape) for each in (A, image, x.mean, x.std))
        constants = Constants(As, images, means, stds, to_device(A.device, c.index), c.y.to(A.dtype))
        step = Step(norm, mask_space, objective)
        ascent = yield from Ascend(u, step, constants, steps, rate, stop_rule, period, min_rows=len(c))  # eq. 9
        u = ascent.u
        done = sum(len(history) for history in ascent.history)
        yield from report_equal_weights(c, have_equal_weights(u.softmax(dim=1).T, A))
        share = 1.0 if all(ascent.ended) else done / (steps * len(c))
    else:
        yield from ReleaseRows(steps * len(c))
    finish = None if norm == "range" else _NORMS[norm]  # None stands for the same function
    return SaliencyMaps(torch.cat([combination(u_t[None], A[None]) for u_t in u]), finish, share)


class Constants(NamedTuple):
    """Constants of B ascents.

    Attributes:
        A: Activations [B, K, h, w].
        image: Image [B, 3, H, W] that the mask multiplies.
        mean: Mean [B, 3, 1, 1] of the normalisation.
        std: Standard deviation [B, 3, 1, 1] of the normalisation.
        classes: Class indices [B].
        y: Logits [B] of the classes for the unmasked image.
    """

    A: Tensor
    image: Tensor
    mean: Tensor
    std: Tensor
    classes: Tensor
    y: Tensor


@dataclass(frozen=True)
class Step:
    """One iteration: the masked images of variables u [B, K], and what the ascent maximises.

    Attributes:
        norm: Function that makes a mask of the map.
        mask_space: Image that the mask multiplies.
        objective: Objective of the ascent.
    """

    norm: Norm
    mask_space: MaskSpace
    objective: Objective

    def rows(self, u: Tensor, of: Constants) -> Tensor:
        """Return the images [B, 3, H, W] under their masks."""
        _, _, height, width = of.image.shape
        masked = of.image * _NORMS[self.norm](combination(u, of.A), (height, width))[:, None]
        return masked if self.mask_space == "normalised" else (masked - of.mean) / of.std

    def objectives(self, y: Tensor, of: Constants) -> Tensor:
        """Return the objectives [B] for the logits y [B, classes] of the masked images."""
        y_c = y.gather(1, of.classes[:, None]).squeeze(1)
        return y_c if self.objective == "mask" else -(y_c - of.y).abs()  # eq. 10, eq. 19


def combination(u: Tensor, A: Tensor) -> Tensor:
    """Return the maps S(u) [B, h, w] of variables u [B, K] and activations A [B, K, h, w] (eq. 8)."""
    weights = u.softmax(dim=1)
    if A.is_cuda:  # the products of `einsum` would be rounded to TF32 in batches at this precision
        return (weights[:, :, None, None] * A).sum(dim=1)
    return torch.einsum("bk,bkhw->bhw", weights, A)


def _has_fallen(period: int, history: Sequence[float]) -> bool:
    """Return True every `period` steps if the objective is lower than `period` steps before."""
    step = len(history) - 1
    return step > 0 and step % period == 0 and history[step] < history[step - period]


def _by_max(S: Tensor, size: tuple[int, int]) -> Tensor:
    s = resize(S, size)
    most = s.amax(dim=(-2, -1), keepdim=True)
    return torch.where(most == 0, 0.0, s / most)


def _by_sigmoid(S: Tensor, size: tuple[int, int]) -> Tensor:
    return resize(S, size).sigmoid()  # The official code writes it as ½(tanh(S/2) + 1).


_NORMS: dict[Norm, Resize] = {"range": resize_minmax, "max": _by_max, "sigmoid": _by_sigmoid}
