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

Window = Annotated[int, Range(0, 10_000), "side of the window in pixels; 0 is 2/7 of each side, 64 of 224"]
Stride = Annotated[int, Range(0, 10_000), "pixels from one window to the next; 0 is 1/28 of each side, 8 of 224"]


@dataclass(frozen=True, eq=False)
class Occluded:
    """Row i is the image with window i set to zero, the mean colour; windows go row by row, the last ones cropped."""

    x: Image
    windows: Sequence[tuple[slice, slice]]

    def __len__(self) -> int:
        return len(self.windows)

    def make(self, start: int, stop: int) -> Tensor:
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
    window: Window = 0,
    stride: Stride = 0,
    signed: Annotated[bool, "keep the sign: windows that speak against the class become the lowest values"] = False,
) -> Plan[SaliencyMaps]:
    """How far the logit falls when a window of the image is hidden: some hundred forward passes.

    x [3, H, W], c [T] class indices → maps [T, H, W], unitless, ≥ 0 unless `signed`.

    Equations:
        S_xy = |mean over the windows that cover xy of y_c(x) − y_c(x, the window hidden)|

    Advice:
        Take it for an answer that needs no theory: what is hidden and what happens. It is as coarse as the window, and
        where hiding something raises the logit it is as bright as where it lowers it, unless signed. It cannot stop
        early, for the last windows are as good as the first.
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
    """Every place of the window, until the side is covered."""
    sides = []
    for length in size:
        w = min(length, window or max(1, round(length * 2 / 7)))
        s = min(w, stride or max(1, round(length / 28)))
        sides.append([slice(s * i, min(length, s * i + w)) for i in range(1 + math.ceil((length - w) / s))])
    return [(ys, xs) for ys in sides[0] for xs in sides[1]]
