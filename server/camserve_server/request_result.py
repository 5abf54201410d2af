"""The result of a request, and the maps that are finished when they are first read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camserve_server.maps import concentration
from camserve_server.maps.rounding import is_constant, rounding
from camserve_server.plan import LeftOut, MetricResult, SaliencyMaps, Targets
from camserve_server.rows import resize, resize_minmax


@dataclass(frozen=True, eq=False)
class LazyMaps:
    """The maps of a request, which are finished when they are first read. T is the number of targets.

    To finish maps is to resize and scale them, and to copy them to the host. It takes much longer than a batch of a
    small network, so the engine's thread does it only if a metric needs the maps.
    """

    _result: SaliencyMaps
    _size: tuple[int, int]
    _maps: FinishedMaps | None

    @property
    def share(self) -> float:
        """The part of the method's full sum that was computed, in (0, 1]."""
        return self._result.share

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The channels that were skipped within the tolerance."""
        return self._result.left_out

    @property
    def own_scaling(self) -> bool:
        """True if the method resizes and scales its maps itself."""
        return self._result.finish is not None

    @property
    def unfinished(self) -> Tensor | None:
        """The maps [T, h, w] from which all others can be computed, on the host; None if that is not possible."""
        return None if self.own_scaling or self._maps is not None else self._result.raw.cpu()

    @cached_property
    def raw(self) -> Tensor:
        """The maps [T, h, w] before they are resized and scaled, float32, on the host."""
        return self._result.raw.float().cpu()

    @property
    def maps(self) -> Tensor:
        """The maps [T, H, W] in [0, 1] at the input size of the model, float32, on the host."""
        return self._finished.maps

    @property
    def warnings(self) -> tuple[tuple[str, ...], ...]:
        """Texts for the reader of the map, for each target."""
        return self._finished.warnings

    @cached_property
    def _finished(self) -> FinishedMaps:
        result = replace(self._result, raw=self._result.raw.cpu())
        maps, warnings = self._maps or finish_maps(result, self._size)
        maps = maps.float().cpu()
        return FinishedMaps(
            maps,
            tuple(
                degenerate or concentration.degenerate_warnings(S) for S, degenerate in zip(maps, warnings, strict=True)
            ),
        )


@dataclass(frozen=True, eq=False)
class RequestResult(LazyMaps):
    """The result of a request.

    Attributes:
        targets: The explained classes with their probabilities and logits, on the host.
        scores: The values of the requested metrics, for each target.
    """

    targets: Targets
    scores: tuple[tuple[MetricResult, ...], ...]
    _logits: Tensor

    @cached_property
    def logits(self) -> Tensor:
        """The prediction for the image [classes], on the host."""
        return self._logits.cpu()


class FinishedMaps(NamedTuple):
    """Maps [T, H, W] in [0, 1], and the warnings of each map."""

    maps: Tensor
    warnings: tuple[tuple[str, ...], ...]


def finish_maps(result: SaliencyMaps, size: tuple[int, int]) -> FinishedMaps:
    """Resize and scale the maps of a method.

    Args:
        result: The maps [T, h, w] of the method.
        size: (H, W), the input size of the model.

    Returns:
        The maps [T, H, W] in [0, 1], and the warnings of each map. A map that is constant, also if only up to rounding,
        or not finite becomes zeros and has a warning.
    """
    if result.finish is None and (fast := _resize_minmax_on_host(result.raw, size)) is not None:
        return FinishedMaps(fast, ((),) * len(fast))
    maps = (result.finish or resize_minmax)(result.raw, size)
    # Scaling can hide values that are not finite.
    finite = result.raw.isfinite().flatten(1).all(dim=1) & maps.isfinite().flatten(1).all(dim=1)
    low, high = maps.flatten(1).amin(dim=1), maps.flatten(1).amax(dim=1)
    constant = finite & ((low == high) | is_constant(result.raw))
    maps = torch.where((finite & ~constant)[:, None, None], maps.clamp(0, 1), 0.0)
    zeroed, advice = result.zeroed or (torch.zeros_like(constant), "")
    kinds = zip(finite.tolist(), constant.tolist(), zeroed.tolist(), strict=True)
    warnings = (
        _degenerate_warning(of_finite, of_constant, advice if of_zeroed else "")
        for of_finite, of_constant, of_zeroed in kinds
    )
    return FinishedMaps(maps, tuple(warnings))


def constant_warning(S: Tensor) -> tuple[str, ...]:
    """Return the warning about a map [H, W] of the caller that is constant, or nothing."""
    return ("degenerate: the map is constant",) if S.min() == S.max() else ()


def _degenerate_warning(finite: bool, constant: bool, advice: str) -> tuple[str, ...]:
    if not finite:
        return ("degenerate: the map is not finite; zeros are returned",)
    if not constant:
        return ()
    text = "degenerate: the map is constant; zeros are returned"
    return (f"{text}; {advice}" if advice else text,)


def _resize_minmax_on_host(raw: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Return the same bits as `resize_minmax`, faster because it works in place.

    Returns:
        The maps, or None if they are not on the host, or if one of them is constant or not finite.
    """
    on_host = raw.device.type == "cpu" and raw.dtype in (torch.float32, torch.float64)
    if not on_host or not _spans(raw.numpy(), rounding(raw)).all():
        return None
    maps = raw.clone() if raw.shape[-2:] == size else resize(raw, size)
    values = maps.numpy()
    spans = _spans(values)
    if not spans.all():
        return None
    values -= values.min(axis=(-2, -1), keepdims=True)
    values /= spans
    return maps


def _spans(values: NDArray[Any], bound: float = 0.0) -> NDArray[Any]:
    """Return maximum minus minimum of each map, [T, 1, 1]; 0 if it is not finite or counts as rounding.

    Args:
        values: Maps [T, h, w].
        bound: Largest span that counts as rounding, relative to the largest absolute value.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = values.min(axis=(-2, -1), keepdims=True), values.max(axis=(-2, -1), keepdims=True)
        spans = high - low
        is_contrast = np.isfinite(spans) & (spans > bound * np.maximum(np.abs(low), np.abs(high)))
    return np.where(is_contrast, spans, 0)
