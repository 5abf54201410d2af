"""IS-CAM: Integrated Score-CAM for axiomatic-based explanations.

Naidu, Ghosh, Maurya, Nayak, Kundu 2020, arXiv:2010.03023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal

import torch
from torch import Tensor

from camserve_server.maps.channels import have_equal_weights, report_equal_weights, select_channels
from camserve_server.plan import Capture, Image, Plan, ReleaseRows, SaliencyMaps, Score, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import Masked, minmax, resize


@dataclass(frozen=True, eq=False)
class Scaled:
    """Masked images times scales: row k·N + i is the row of the k-th mask times `scales[i]`, N = len(scales)."""

    masked: Masked
    scales: Sequence[float]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.masked) * len(self.scales)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        N = len(self.scales)
        first = start // N
        rows = self.masked.make(first, (stop - 1) // N + 1)
        return torch.stack([self.scales[row % N] * rows[row // N - first] for row in range(start, stop)])


def _rows(sizes: Sizes, *, steps: int = 10, **_: object) -> int:
    return 1 + steps * sizes.channels[0]


def _min_rows(sizes: Sizes, *, steps: int = 10, **_: object) -> int:
    return 1 + steps


@method("is-cam", title="IS-CAM", paper="arXiv:2010.03023", rows=_rows, min_rows=_min_rows)
def is_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    steps: Annotated[int, Range(1, 1000)] = 10,
    variant: Literal["paper", "torchcam"] = "paper",
) -> Plan[SaliencyMaps]:
    """Score-CAM with each score averaged over scaled masks: several forward passes per channel.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        steps: Number of scales N of each mask.
        variant: torchcam 0.5 accumulates the scales, up to 5.5 times the mask for ten steps.

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        w_k = softmax_k mean_i y_c(x ⊙ (i/N) n(up(A_k))),  i = 1 … N
        S   = relu(Σ_k w_k A_k)

    Advice:
        Use it to repeat a comparison that includes it. It is similar to Score-CAM and costs N times as much.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    selected = select_channels(A, include_zero=True)
    yield from ReleaseRows(steps * (len(A) - len(selected)))
    scales = [i / steps for i in range(1, steps + 1)]
    masked = Masked(x, A[selected.indices])
    if variant == "torchcam":
        scales = [*accumulate(scales)]
        masked = Masked(x, A[selected.indices], _scaled_first)
    scores = yield from Score(Scaled(masked, scales), c, min_rows=steps)
    done = len(scores.logits) // steps
    y = scores.logits[: done * steps].reshape(done, steps, -1).mean(dim=1)  # [channels, T]
    w = selected.to_all_channels(y, missing=-torch.inf).softmax(dim=0)
    run = selected.indices[:done]
    yield from report_equal_weights(c, have_equal_weights(w[run], A[run]))
    S = torch.einsum("kt,khw->thw", w.to(A.dtype), A).relu()
    return SaliencyMaps(S, share=selected.share(done))


def _scaled_first(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks of torchcam: scaled to [0, 1] before they are resized, so that few of them reach both ends."""
    return resize(minmax(maps), size)
