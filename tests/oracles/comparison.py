"""Comparison of maps, and stand-ins for random distributions of other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.poly_cam import minmax


def gap(ours: Any, theirs: Any) -> float:
    """Return the greatest absolute difference of two maps, in float64."""
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)).max())


def relative_gap(ours: Any, theirs: Any) -> float:
    """Return the greatest absolute difference over the greatest value of `theirs`, which must not be all zero."""
    scale = float(np.abs(np.asarray(theirs)).max())
    assert scale > 0
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max()) / scale


def unit(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map [h, w] to `size` and scale it to [0, 1]."""
    return minmax(F.interpolate(maps[None, None], size, mode="bilinear", align_corners=False)[0, 0])


class FixedSamples:
    """Replacement of a torch distribution that returns given samples one after the other."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = list(samples)

    def sample(self, size: torch.Size) -> Tensor:
        """Return the next sample in the given shape."""
        sample: Tensor = self.samples.pop(0)
        return sample.reshape(size)
