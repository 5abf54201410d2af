"""Occlusion: Visualizing and Understanding Convolutional Networks.

Zeiler, Fergus 2014, arXiv:1311.2901.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Image, Plan, SaliencyMaps, Score, Scores, Sum, Targets
from camserve_server.registry import Range, Sizes, method


@dataclass(frozen=True, eq=False)
class Occluded:
    """Image with one window hidden: in row i, window i is zero, the mean colour."""

    x: Image
    windows: Sequence[tuple[slice, slice]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.windows)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        rows = self.x.tensor.repeat(stop - start, 1, 1, 1)
        for row, (ys, xs) in zip(rows, self.windows[start:stop], strict=True):
            row[:, ys, xs] = 0
        return rows


def _rows(sizes: Sizes, *, window: int = 0, stride: int = 0, **_: object) -> int:
    return len(_windows(sizes.pixels, window, stride))


@method("occlusion", title="Occlusion", paper="arXiv:1311.2901", rows=_rows)
def occlusion(
    x: Image,
    c: Targets,
    *,
    window: Annotated[int, Range(0, 10_000)] = 0,
    stride: Annotated[int, Range(0, 10_000)] = 0,
    signed: bool = False,
) -> Plan[SaliencyMaps]:
    """Fall of the logit when a window hides a part of the image: some hundred forward passes.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        window: Side of the window in pixels. 0 stands for 2/7 of each side, 64 of 224 pixels.
        stride: Distance between windows in pixels, at most their side. 0 stands for 1/28 of each side, 8 of 224 pixels.
        signed: Keep the sign, so that windows with evidence against the class get the lowest values.

    Returns:
        Maps [T, H, W], unitless, ≥ 0 unless `signed`.

    Equations:
        S_xy = |mean over the windows that cover xy of y_c(x) − y_c(x, the window hidden)|

    Advice:
        Use it if you need a map that is easy to understand: it shows how much hiding each part changes the logit. It is
        as coarse as the window. Unless it is signed, a part that raises the logit when hidden is as bright as one that
        lowers it. It cannot stop early, because all windows have the same importance.
    """
    windows = _windows(x.size, window, stride)
    size = x.size

    def term(i: int, answer: Scores) -> Tensor:
        fall = torch.zeros(len(c) + 1, *size, dtype=torch.float64, device=c.y.device)
        ys, xs = windows[i]
        fall[: len(c), ys, xs] = (c.y - answer.logits[0])[:, None, None]
        fall[len(c), ys, xs] = 1
        return fall

    summed = yield from Sum(Score(Occluded(x, windows), c), term)
    falls, covers = summed.total[0, : len(c)], summed.total[0, len(c)]
    S = (falls / covers).to(x.tensor.dtype)
    return SaliencyMaps(S if signed else S.abs())


def _windows(size: tuple[int, int], window: int, stride: int) -> list[tuple[slice, slice]]:
    """Return all windows (rows, columns) in row-major order. The last ones are cropped at the border of the image."""
    sides = []
    for length in size:
        w = min(length, window or max(1, round(length * 2 / 7)))
        s = min(w, stride or max(1, round(length / 28)))
        sides.append([slice(s * i, min(length, s * i + w)) for i in range(1 + math.ceil((length - w) / s))])
    return [(ys, xs) for ys in sides[0] for xs in sides[1]]
