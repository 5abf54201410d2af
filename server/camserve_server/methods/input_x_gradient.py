"""Input × Gradient: Not Just a Black Box: Learning Important Features Through Propagating Activation Differences.

Shrikumar, Greenside, Shcherbina, Kundaje 2016, arXiv:1605.01713.
"""

from __future__ import annotations

from camserve_server.plan import INPUT, Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated


@method(
    "input-x-gradient",
    title="Input × Gradient",
    paper="arXiv:1605.01713",
    rows=lambda sizes, **_: sizes.targets,
    passes="gradient",
)
def input_x_gradient(x: Image, c: Targets, *, signed: bool = False) -> Plan[SaliencyMaps]:
    """The normalised image times the gradient of the class's logit: one forward and backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        signed: Keep the sign, so that evidence against the class gets the lowest values.

    Returns:
        Maps [T, H, W], unitless, ≥ 0 unless `signed`.

    Equations:
        S = |Σ_rgb x ⊙ ∂y_c/∂x|

    Advice:
        Use it as a baseline for gradients. It is as fine as the image and as noisy as gradients are. Positions with the
        mean colour are always zero, because the normalised image is zero there.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, (INPUT,))
    S = (x.tensor * answer.gradients[0]).sum(dim=1)
    return SaliencyMaps(S if signed else S.abs())
