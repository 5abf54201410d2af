"""Eigen-CAM: Class Activation Map using Principal Components.

Muhammad, Yeasin 2020, arXiv:2008.00299.
"""

from __future__ import annotations

import torch

from camserve_server.plan import Capture, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method

# Largest correlation with the sum of the activations, as a share of that with the sum of their absolute values, that
# counts as rounding. Its sign would be arbitrary.
ROUNDING = 1e-6


@method("eigen-cam", title="Eigen-CAM", paper="arXiv:2008.00299", rows=lambda sizes, **_: 1, class_agnostic=True)
def eigen_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    centred: bool = False,
) -> Plan[SaliencyMaps]:
    """The first principal component of the activations: one forward pass, the same map for every class.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        centred: Subtract the mean of each channel first, as the library grad-cam does.

    Returns:
        Maps [T, h, w], unitless, signed.

    Equations:
        A [hw, K] = U Σ Vᵀ
        S = A v_1

        The sign of v_1 is arbitrary. It is chosen so that the map correlates positively with the sum of the
        activations. If the sum is zero everywhere, as after a layer norm without an affine function, the largest
        absolute value of the map is positive.

    Advice:
        Use it to see the most salient structure of the image for the network, independent of the class. It cannot
        distinguish classes.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    columns = A.flatten(1).T.double()  # [hw, K]
    if centred:
        columns = columns - columns.mean(dim=0)
    if not columns.isfinite().all():  # The decomposition would fail.
        return SaliencyMaps(A.new_full((len(c), *A.shape[1:]), torch.nan))
    S = columns @ torch.linalg.svd(columns, full_matrices=False).Vh[0]
    total, of_terms = A.flatten(1).sum(dim=0).double(), A.flatten(1).abs().sum(dim=0).double()
    correlation = S @ total
    is_rounding = correlation.abs() <= ROUNDING * (S.abs() @ of_terms)
    sign_of = torch.where(is_rounding, S[S.abs().argmax()], correlation)
    S = torch.where(sign_of < 0, -S, S).to(A.dtype)
    return SaliencyMaps(S.reshape(1, *A.shape[1:]).expand(len(c), -1, -1))
