"""Eigen-CAM: Class Activation Map using Principal Components.

Muhammad, Yeasin 2020, arXiv:2008.00299.
"""

from __future__ import annotations

from typing import Annotated

import torch

from camserve_server.plan import Capture, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method


@method("eigen-cam", title="Eigen-CAM", paper="arXiv:2008.00299", rows=lambda sizes, **_: 1, class_agnostic=True)
def eigen_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    centred: Annotated[bool, "take each channel's mean off first, as the library grad-cam does"] = False,
) -> Plan[SaliencyMaps]:
    """The first principal component of the activations: one forward pass, the same map for every class.

    x [3, H, W], c [T] class indices → maps [T, h, w], unitless, signed.

    Equations:
        A [hw, K] = U Σ Vᵀ
        S = A v_1

    The sign, which this leaves open, is the one in which the map goes along with the sum of the activations.

    Advice:
        Take it to see what stands out in the picture to the network, whatever the class. It cannot explain one class
        against another.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    columns = A.flatten(1).T.double()  # [hw, K]
    if centred:
        columns = columns - columns.mean(dim=0)
    if not columns.isfinite().all():  # which the decomposition refuses
        return SaliencyMaps(A.new_full((len(c), *A.shape[1:]), torch.nan))
    S = columns @ torch.linalg.svd(columns, full_matrices=False).Vh[0]
    S = torch.where(S @ A.flatten(1).sum(dim=0).double() < 0, -S, S).to(A.dtype)
    return SaliencyMaps(S.reshape(1, *A.shape[1:]).expand(len(c), -1, -1))
