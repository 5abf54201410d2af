"""Center-Gaussian: Evaluation for Weakly Supervised Object Localization: Protocol, Metrics, and Datasets.

Choe, Oh, Chun, Lee, Akata, Shim 2020, arXiv:2007.04178.
"""

from __future__ import annotations

from typing import Annotated

import torch

from camserve_server.plan import Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import Range, method


@method(
    "center-gaussian", title="Center-Gaussian", paper="arXiv:2007.04178", rows=lambda sizes, **_: 0, class_agnostic=True
)
def center_gaussian(
    x: Image,
    c: Targets,
    *,
    sigma: Annotated[float, Range(0.01, 10)] = 0.25,
) -> Plan[SaliencyMaps]:
    """A Gaussian in the centre of the image: photographs often show their subject there, and many metrics reward it.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        sigma: Standard deviation, as a fraction of the shorter side.

    Returns:
        Maps [T, H, W], unitless, in (0, 1].

    Equations:
        S_ij = exp(−((i − (H − 1)/2)² + (j − (W − 1)/2)²) / 2σ²)

        σ is in pixels here: the parameter times the shorter side. It changes neither the order of the pixels nor the
        boxes that thresholds can give. The paper leaves it at 1.

    Advice:
        A control for metrics, especially for those of localisation. A method that is not better than this map has found
        no more than the centre of the image.
    """
    dy, dx = (torch.arange(side, dtype=x.tensor.dtype, device=x.tensor.device) - (side - 1) / 2 for side in x.size)
    across = 2 * (sigma * min(x.size)) ** 2
    S = torch.exp(-(dy[:, None].square() + dx.square()) / across)
    yield from ()
    return SaliencyMaps(S.expand(len(c), -1, -1))
