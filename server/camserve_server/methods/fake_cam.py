"""Fake-CAM: Revisiting The Evaluation of Class Activation Mapping for Explainability.

Poppi, Cornia, Baraldi, Cucchiara 2021, arXiv:2104.10252.
"""

from __future__ import annotations

from camserve_server.plan import Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method


@method("fake-cam", title="Fake-CAM", paper="arXiv:2104.10252", rows=lambda sizes: 0, class_agnostic=True)
def fake_cam(x: Image, c: Targets) -> Plan[SaliencyMaps]:
    """One everywhere except for a zero in the top left corner: it explains nothing, but has a good average drop.

    Args:
        x: Image [3, H, W].
        c: T target classes.

    Returns:
        Maps [T, H, W], 0 or 1.

    Equations:
        S = 1, but S_00 = 0

    Advice:
        A control for metrics. Do not rely on a metric alone if this map scores well, as it does for average drop and
        average increase.
    """
    S = x.tensor.new_ones(len(c), *x.size)
    S[:, 0, 0] = 0
    yield from ()
    return SaliencyMaps(S)
