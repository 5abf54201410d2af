"""The network `tests.nets.TinyPoly` in numpy, for servers in environments without torch."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float32]


class NumpyNet:
    """Classifier of images [N, 3, H, W], where H and W are multiples of 4.

    Args:
        path: Weights (.npz) with the names of `TinyPoly`.
    """

    def __init__(self, path: str) -> None:
        self._weights = dict(np.load(path))

    def __call__(self, x: Array) -> dict[str, Array]:
        """Return the outputs of r1, r2 and r3, and the logits [N, classes]."""
        r1 = self._conv("c1", x)
        r2 = self._conv("c2", _pool(r1))
        r3 = self._conv("c3", _pool(r2))
        logits = r3.mean(axis=(2, 3)) @ self._weights["fc.weight"].T + self._weights["fc.bias"]
        return {"r1": r1, "r2": r2, "r3": r3, "logits": logits.astype(np.float32)}

    def _conv(self, name: str, x: Array) -> Array:
        windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
        y = np.einsum("nchwij,kcij->nkhw", windows, self._weights[f"{name}.weight"], optimize=True)
        result: Array = np.maximum(y + self._weights[f"{name}.bias"][:, None, None], 0).astype(np.float32)
        return result


def _pool(x: Array) -> Array:
    n, k, h, w = x.shape
    pooled: Array = x.reshape(n, k, h // 2, 2, w // 2, 2).max(axis=(3, 5))
    return pooled
