"""SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization.

Wang, Naidu, Michael, Kundu 2020, arXiv:2006.14255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.maps.channels import have_equal_weights, report_equal_weights, select_channels
from camserve_server.plan import Capture, Image, Plan, ReleaseRows, SaliencyMaps, Score, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import normal, resize_minmax


@dataclass(frozen=True, eq=False)
class Noisy:
    """Images under noisy masks: row i·K + k is x ⊙ (n(up(A_k)) + σ δ_i).

    The noise δ_i [H, W] is normal. All channels share the noise of a sample.

    Attributes:
        x: The image.
        activations: Activations [K, h, w].
        samples: Number of samples of the noise.
        sigma: Standard deviation σ of the noise.
        seed: Seed of the noise.
    """

    x: Image
    activations: Tensor
    samples: int
    sigma: float
    seed: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.samples * len(self.activations)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        K = len(self.activations)
        M = resize_minmax(self.activations[[row % K for row in range(start, stop)]], self.x.size)
        fields = {i: normal(self.x.size, self.seed, i).to(M) for i in range(start // K, (stop - 1) // K + 1)}
        noise = torch.stack([fields[row // K] for row in range(start, stop)])
        return self.x.tensor * (M + self.sigma * noise).unsqueeze(1)


def _rows(sizes: Sizes, *, samples: int = 35, **_: object) -> int:
    return 1 + samples * sizes.channels[0]


@method("ss-cam", title="SS-CAM", paper="arXiv:2006.14255", rows=_rows, min_rows=lambda sizes, **_: 2)
def ss_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    samples: Annotated[int, Range(1, 1000)] = 35,
    sigma: Annotated[float, Range(0, 100)] = 2.0,
    seed: int,
) -> Plan[SaliencyMaps]:
    """Score-CAM with each score averaged over noisy masks: tens of forward passes per channel.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        samples: Number of noisy masks of each channel.
        sigma: Standard deviation of the noise. The masks lie in [0, 1].
        seed: Seed of the noise.

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        w_k = softmax_k mean_i y_c(x ⊙ (n(up(A_k)) + σ δ_i))
        S   = relu(Σ_k w_k A_k)

    Advice:
        Use it to repeat a comparison that includes it. With the σ of the paper, the noise is stronger than the mask,
        and it costs 35 times as much as Score-CAM.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    selected = select_channels(A, include_zero=True)
    yield from ReleaseRows(samples * (len(A) - len(selected)))
    scores = yield from Score(Noisy(x, A[selected.indices], samples, sigma, seed), c, min_rows=1)
    y = scores.logits  # [rows, T]
    mean = torch.stack([y[k :: len(selected)].mean(dim=0) for k in range(min(len(y), len(selected)))])
    w = selected.to_all_channels(mean, missing=-torch.inf).softmax(dim=0)
    run = selected.indices[: len(mean)]
    yield from report_equal_weights(c, have_equal_weights(w[run], A[run]))
    S = torch.einsum("kt,khw->thw", w.to(A.dtype), A).relu()
    return SaliencyMaps(S, share=len(y) / (samples * len(selected)))
