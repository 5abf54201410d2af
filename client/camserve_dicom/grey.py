"""Stored values of a grey image → what is shown: modality LUT, VOI LUT, MONOCHROME1, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset

from camserve_dicom import lookup_tables
from camserve_dicom.errors import DicomError

__all__ = ["of_frame", "pixel_aspect", "readable", "shown", "spacing"]

# Where nobody says which grey levels matter; the darkest and brightest are often markers.
_PERCENTILES = (0.5, 99.5)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def of_frame(dataset: Dataset, frame: int) -> Dataset:
    """The header with what its functional groups say of the frame, which enhanced objects have instead."""
    header = Dataset()
    header.update(dataset)
    if hasattr(dataset, "file_meta"):
        header.file_meta = dataset.file_meta  # which says in what order the bytes of tables are
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


def spacing(header: Dataset, *names: str) -> tuple[float, float] | None:
    """From row to row and from column to column, by the first of the attributes that has two lengths."""
    for name in names:
        value = header.get(name)
        if isinstance(value, Sequence | list) and len(value) == 2:
            vertical, horizontal = map(float, value)
            if vertical > 0 and horizontal > 0:
                return vertical, horizontal
    return None


def pixel_aspect(header: Dataset) -> float:
    """How much higher a pixel is than wide."""
    names = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
    vertical, horizontal = spacing(header, *names) or (1.0, 1.0)
    return vertical / horizontal


def shown(
    stored: NDArray[Any],
    header: Dataset,
    window: tuple[float, float] | None,
    box: tuple[int, int, int, int],
    steps: list[str],
) -> tuple[NDArray[np.uint8], Mask | None, Dataset]:
    """uint8 [H, W], black being the least; where there is padding; and the LUTs that were applied, as attributes.

    Only what is in the box counts.
    """
    luts = Dataset()
    padding = _padding(stored, header)
    if stored.dtype.kind == "f" and not (finite := np.isfinite(stored)).all():
        padding = ~finite if padding is None else padding | ~finite
        stored = np.where(finite, stored, 0)
    values = _values(stored, header, steps, luts)
    levels = _levels(values, padding, header, window, box, steps, luts)
    if header.PhotometricInterpretation == "MONOCHROME1":
        levels = 1 - levels
        steps.append("MONOCHROME1 inverted")
    if padding is not None:
        levels = np.where(padding, 0, levels)
        steps.append("padding made black")
    return np.rint(255 * levels).astype(np.uint8), padding, luts


def _values(stored: NDArray[Any], header: Dataset, steps: list[str], luts: Dataset) -> Floats:
    """By the modality LUT, or the slope and intercept."""
    if header.get("ModalityLUTSequence"):
        steps.append("modality LUT")
        [of_header, *_] = header.ModalityLUTSequence
        first, table, bits = _table(header, of_header, signed=bool(header.PixelRepresentation))
        item = lookup_tables.as_item(first, table, 8 if bits == 8 and table.max() < 256 else 16)
        item.ModalityLUTType = of_header.get("ModalityLUTType") or "US"
        luts.ModalityLUTSequence = [item]
        return lookup_tables.looked_up(stored, first, table).astype(np.float64)
    slope, intercept = _rescaling(header)
    values = stored.astype(np.float64)
    if (slope, intercept) != (None, None):
        slope, intercept = slope or 1.0, intercept or 0.0  # a slope of 0 would leave nothing of the image
        steps.append(f"rescaled by {slope:g} and {intercept:g}")
        luts.RescaleSlope, luts.RescaleIntercept = _decimal(slope), _decimal(intercept)
        luts.RescaleType = header.get("RescaleType") or "US"
        values = values * slope + intercept
    return values


def _rescaling(header: Dataset) -> tuple[float | None, float | None]:
    return _first(header.get("RescaleSlope")), _first(header.get("RescaleIntercept"))


def _table(header: Dataset, item: Dataset, *, signed: bool) -> tuple[int, lookup_tables.Entries, int]:
    """The value that gets the first entry, the entries, and how many bits they have."""
    descriptor = item.LUTDescriptor
    if not 1 <= descriptor[2] <= 16:
        raise ValueError("entries of a lookup table have 1 to 16 bits")
    little_endian = header.file_meta.TransferSyntaxUID.is_little_endian
    table = lookup_tables.entries(descriptor, item["LUTData"], little_endian=little_endian)
    return lookup_tables.first_mapped(descriptor, signed=signed), table, int(descriptor[2])


def _may_be_negative(header: Dataset) -> bool:
    """Whether values can be, once the modality LUT is applied."""
    if header.get("ModalityLUTSequence"):
        return False
    slope, intercept = _rescaling(header)
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return min(end * (slope or 1.0) + (intercept or 0.0) for end in ends) < 0


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
    luts: Dataset,
) -> Floats:
    """Values → [0, 1]: by the window that is given, the header's table or window, or percentiles."""
    if window is not None:
        centre, width = map(float, window)
        if not _is_window(centre, width, "LINEAR"):
            raise DicomError("a window is at least 1 wide", "UNSUPPORTED_PIXELS", field="window")
        steps.append(f"window {centre:g}/{width:g}, as asked")
        return _windowed(values, centre, width, "LINEAR", luts)
    if header.get("VOILUTSequence"):
        steps.append("VOI LUT")
        first, table, bits = _table(header, header.VOILUTSequence[0], signed=_may_be_negative(header))
        shades = (table / (2**bits - 1)).clip(0, 1)
        # A presentation state's has 8 or 16 bits, an image's any number between.
        luts.VOILUTSequence = [lookup_tables.as_item(first, np.rint(65535 * shades).astype(np.uint16), 16)]
        levels: Floats = lookup_tables.looked_up(values, first, shades)
        return levels
    function = str(header.get("VOILUTFunction") or "").strip().upper()
    function = function if function in ("SIGMOID", "LINEAR_EXACT") else "LINEAR"
    found = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if found[0] is not None and found[1] is not None and _is_window(found[0], found[1], function):
        steps.append(f"window {found[0]:g}/{found[1]:g}, the header's")
        return _windowed(values, found[0], found[1], function, luts)
    left, top, right, bottom = box
    part = values[top:bottom, left:right]
    counted = part if padding is None else part[~padding[top:bottom, left:right]]
    low, high = np.percentile(counted if counted.size else part, _PERCENTILES)
    steps.append(f"{low:g} to {high:g}, the {_PERCENTILES[0]:g} to {_PERCENTILES[1]:g} percentile")
    if high > low:
        _say(luts, (low + high + 1) / 2, high - low + 1, "LINEAR")
        levels = (values - low) / (high - low)
        return levels.clip(0, 1)
    _say(luts, float(values.max()) + 1, 1, "LINEAR")  # all of it is below
    return np.zeros_like(values)


def _first(value: Any) -> float | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    return None if value in (None, "") else float(value)


def _is_window(centre: float, width: float, function: str) -> bool:
    return math.isfinite(centre) and math.isfinite(width) and (width >= 1 if function == "LINEAR" else width > 0)


def _windowed(values: Floats, centre: float, width: float, function: str, luts: Dataset) -> Floats:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, onto [0, 1]."""
    _say(luts, centre, width, function)
    if function == "SIGMOID":
        sigmoid: Floats = 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
        return sigmoid
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _say(luts: Dataset, centre: float, width: float, function: str) -> None:
    luts.WindowCenter, luts.WindowWidth, luts.VOILUTFunction = _decimal(centre), _decimal(width), function


def _decimal(value: float) -> str:
    """A decimal string holds 16 characters."""
    return f"{value:.10g}"
