"""Maps whose differences may be rounding errors. Scaled, they would look like a map."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest span of a map that counts as rounding, as a share of its largest absolute value, in units of its precision.
# Rounding reaches five units in Poly-CAM. A map with such a span would have few different values.
ROUNDING = 32


def rounding(S: Tensor) -> float:
    """Return the `ROUNDING` of maps, relative to their largest absolute value."""
    return ROUNDING * torch.finfo(torch.float64 if S.dtype == torch.float64 else torch.float32).eps


def is_constant(S: Tensor) -> Tensor:
    """Return True [T] for the finite maps [T, h, w] that are constant up to rounding errors."""
    low, high = S.flatten(1).amin(dim=1), S.flatten(1).amax(dim=1)
    span = high - low
    return span.isfinite() & (span <= rounding(S) * torch.maximum(low.abs(), high.abs()))
