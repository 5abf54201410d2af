"""Stored values of a grey image → what is shown: modality LUT, VOI LUT, MONOCHROME1, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from camserve.dicom.errors import DicomError

__all__ = ["of_frame", "pixel_aspect", "readable", "shown"]

# Where nobody says which grey levels matter; the darkest and brightest are often markers.
_PERCENTILES = (0.5, 99.5)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def of_frame(dataset: Dataset, frame: int) -> Dataset:
    """The header with what its functional groups say of the frame, which enhanced objects have instead."""
    header = Dataset()
    header.update(dataset)
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*shared, *own):
        for element in group:
            if element.VR == "SQ" and len(element.value) == 1:
                header.update(element.value[0])
    return header


def readable(header: Dataset, name: str) -> DataElement | None:
    """The element, if it is there and what it says can be read: a number like "63,2" cannot."""
    try:
        return header[name]
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def pixel_aspect(header: Dataset) -> float:
    """How much higher a pixel is than wide."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        value = header.get(name)
        if isinstance(value, Sequence | list) and len(value) == 2:
            vertical, horizontal = map(float, value)
            if vertical > 0 and horizontal > 0:
                return vertical / horizontal
    return 1.0


def shown(
    stored: NDArray[Any],
    header: Dataset,
    window: tuple[float, float] | None,
    box: tuple[int, int, int, int],
    steps: list[str],
) -> tuple[NDArray[np.uint8], Mask | None]:
    """uint8 [H, W], black being the least, and where there is padding. Only what is in the box counts."""
    padding = _padding(stored, header)
    values = apply_modality_lut(stored, header).astype(np.float64)
    if header.get("ModalityLUTSequence"):
        steps.append("modality LUT")
    elif header.get("RescaleSlope") is not None:
        steps.append(f"rescaled by {float(header.RescaleSlope):g} and {float(header.RescaleIntercept):g}")
    levels = _levels(values, padding, header, window, box, steps)
    if header.PhotometricInterpretation == "MONOCHROME1":
        levels = 1 - levels
        steps.append("MONOCHROME1 inverted")
    if padding is not None:
        levels = np.where(padding, 0, levels)
        steps.append("padding made black")
    return np.rint(255 * levels).astype(np.uint8), padding


def _padding(stored: NDArray[Any], header: Dataset) -> Mask | None:
    value = header.get("PixelPaddingValue")
    if value is None:
        return None
    # Both are of the stored values' kind, which the other way of reading 16 bits may have missed.
    ends = [_as_stored(int(each), header) for each in (value, header.get("PixelPaddingRangeLimit", value))]
    mask: Mask = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() and not mask.all() else None


def _as_stored(value: int, header: Dataset) -> int:
    bits = int(header.BitsAllocated)
    value %= 2**bits
    return value - 2**bits if header.PixelRepresentation and value >= 2 ** (bits - 1) else value


def _levels(
    values: Floats,
    padding: Mask | None,
    header: Dataset,
    window: tuple[float, float] | None,
    box: tuple[int, int, int, int],
    steps: list[str],
) -> Floats:
    """Values → [0, 1]: by the window that is given, the header's table or window, or percentiles."""
    if window is not None:
        centre, width = map(float, window)
        steps.append(f"window {centre:g}/{width:g}, as asked")
        return _windowed(values, centre, width, "LINEAR")
    if header.get("VOILUTSequence"):
        steps.append("VOI LUT")
        table = header.VOILUTSequence[0]
        deepest = float(2 ** int(table.LUTDescriptor[2]) - 1)
        looked_up: Floats = apply_voi(np.rint(values).astype(np.int64), header).astype(np.float64)
        looked_up /= deepest
        return looked_up.clip(0, 1)
    function = str(header.get("VOILUTFunction") or "LINEAR")
    found = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if found[0] is not None and found[1] is not None and _is_width(found[1], function):
        steps.append(f"window {found[0]:g}/{found[1]:g}, the header's")
        return _windowed(values, found[0], found[1], function)
    left, top, right, bottom = box
    part = values[top:bottom, left:right]
    counted = part if padding is None else part[~padding[top:bottom, left:right]]
    low, high = np.percentile(counted if counted.size else part, _PERCENTILES)
    steps.append(f"{low:g} to {high:g}, the {_PERCENTILES[0]:g} to {_PERCENTILES[1]:g} percentile")
    result: Floats = ((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)
    return result


def _first(value: Any) -> float | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    return None if value in (None, "") else float(value)


def _is_width(width: float, function: str) -> bool:
    return width >= 1 if function == "LINEAR" else width > 0


def _windowed(values: Floats, centre: float, width: float, function: str) -> Floats:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, onto [0, 1]."""
    if not _is_width(width, function):
        raise DicomError("a window is at least 1 wide", "UNSUPPORTED_PIXELS", field="window")
    if function == "SIGMOID":
        sigmoid: Floats = 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
        return sigmoid
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
