"""Greyscale rendering: modality LUT, VOI LUT or window, MONOCHROME1 and padding (PS3.4 N.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from camserve_dicom import lookup_tables
from camserve_dicom.errors import DicomError

__all__ = ["render"]

# The window of an image without one. The darkest and brightest pixels are often markers.
_PERCENTILES = (0.5, 99.5)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def render(
    stored: NDArray[Any],
    header: Dataset,
    window: tuple[float, float] | None,
    box: tuple[int, int, int, int],
    steps: list[str],
) -> tuple[NDArray[np.uint8], Mask | None, Dataset]:
    """Render stored values as grey levels.

    Args:
        stored: Stored values [H, W].
        header: The header of the frame.
        window: (centre, width) of the rescaled values, which replaces the window or VOI LUT of the header.
        box: (left, top, right, bottom) of the displayed part. Percentiles are computed from it.
        steps: A list to which the function appends a description of each step.

    Returns:
        Grey levels uint8 [H, W] with 0 as black, a mask [H, W] of padding (None without padding), and the applied
        modality LUT and VOI LUT or window as attributes of a presentation state.

    Raises:
        DicomError: If the width of `window` is below 1.
        ValueError: If a lookup table is invalid.
    """
    luts = Dataset()
    padding = _padding_mask(stored, header)
    if stored.dtype.kind == "f" and not (finite := np.isfinite(stored)).all():
        padding = ~finite if padding is None else padding | ~finite
        stored = np.where(finite, stored, 0)
    values = _apply_modality(stored, header, steps, luts)
    levels = _apply_voi(values, padding, header, window, box, steps, luts)
    if header.PhotometricInterpretation == "MONOCHROME1":
        levels = 1 - levels
        steps.append("MONOCHROME1 inverted")
    if padding is not None:
        levels = np.where(padding, 0, levels)
        steps.append("padding made black")
    return np.rint(255 * levels).astype(np.uint8), padding, luts


def _apply_modality(stored: NDArray[Any], header: Dataset, steps: list[str], luts: Dataset) -> Floats:
    """Apply the modality LUT, or Rescale Slope and Intercept."""
    if header.get("ModalityLUTSequence"):
        steps.append("modality LUT")
        [header_item, *_] = header.ModalityLUTSequence
        first, table, bits = _read_table(header, header_item, signed=bool(header.PixelRepresentation))
        item = lookup_tables.table_item(first, table, 8 if bits == 8 and table.max() < 256 else 16)
        item.ModalityLUTType = header_item.get("ModalityLUTType") or "US"
        luts.ModalityLUTSequence = [item]
        return lookup_tables.apply_table(stored, first, table).astype(np.float64)
    slope, intercept = _rescale_parameters(header)
    values = stored.astype(np.float64)
    if (slope, intercept) != (None, None):
        slope, intercept = slope or 1.0, intercept or 0.0  # a slope of 0 would make all values equal
        steps.append(f"rescaled by {slope:g} and {intercept:g}")
        luts.RescaleSlope, luts.RescaleIntercept = _decimal_string(slope), _decimal_string(intercept)
        luts.RescaleType = header.get("RescaleType") or "US"
        values = values * slope + intercept
    return values


def _rescale_parameters(header: Dataset) -> tuple[float | None, float | None]:
    """Return Rescale Slope and Rescale Intercept."""
    return _first_number(header.get("RescaleSlope")), _first_number(header.get("RescaleIntercept"))


def _read_table(header: Dataset, item: Dataset, *, signed: bool) -> tuple[int, lookup_tables.Entries, int]:
    """Return the first mapped value of a lookup table, its entries and its bits per entry."""
    descriptor = item.LUTDescriptor
    if not 1 <= descriptor[2] <= 16:
        raise ValueError(f"the lookup table has {descriptor[2]} bits per entry; expected 1 to 16")
    little_endian = header.file_meta.TransferSyntaxUID.is_little_endian
    table = lookup_tables.table_entries(descriptor, item["LUTData"], little_endian=little_endian)
    return lookup_tables.first_mapped_value(descriptor, signed=signed), table, int(descriptor[2])


def _may_be_negative(header: Dataset) -> bool:
    """Return True if values may be negative after the modality LUT or rescaling."""
    if header.get("ModalityLUTSequence"):
        return False
    slope, intercept = _rescale_parameters(header)
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return min(end * (slope or 1.0) + (intercept or 0.0) for end in ends) < 0


def _padding_mask(stored: NDArray[Any], header: Dataset) -> Mask | None:
    """Return a mask of pixels in the range of Pixel Padding Value and Range Limit; None for no pixel or all."""
    value = header.get("PixelPaddingValue")
    if value is None:
        return None
    # Both attributes have the sign of the stored values. Implicit VR may have been parsed with the other sign.
    ends = [_as_stored_value(int(each), header) for each in (value, header.get("PixelPaddingRangeLimit", value))]
    mask: Mask = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() and not mask.all() else None


def _as_stored_value(value: int, header: Dataset) -> int:
    """Reinterpret a value with the sign and size of stored values."""
    bits = int(header.BitsAllocated)
    value %= 2**bits
    return value - 2**bits if header.PixelRepresentation and value >= 2 ** (bits - 1) else value


def _apply_voi(
    values: Floats,
    padding: Mask | None,
    header: Dataset,
    window: tuple[float, float] | None,
    box: tuple[int, int, int, int],
    steps: list[str],
    luts: Dataset,
) -> Floats:
    """Map values to [0, 1] by the caller's window, the VOI LUT or window of the header, or percentiles."""
    if window is not None:
        centre, width = map(float, window)
        if not _is_valid_window(centre, width, "LINEAR"):
            raise DicomError(
                f"the window's width is {width:g}; expected a finite centre and a width of at least 1",
                "UNSUPPORTED_PIXELS",
                field="window",
            )
        steps.append(f"window {centre:g}/{width:g}, as asked")
        return _apply_window(values, centre, width, "LINEAR", luts)
    if header.get("VOILUTSequence"):
        steps.append("VOI LUT")
        first, table, bits = _read_table(header, header.VOILUTSequence[0], signed=_may_be_negative(header))
        shades = (table / (2**bits - 1)).clip(0, 1)
        # A VOI LUT of an image may have any number of bits, one of a presentation state only 8 or 16.
        luts.VOILUTSequence = [lookup_tables.table_item(first, np.rint(65535 * shades).astype(np.uint16), 16)]
        levels: Floats = lookup_tables.apply_table(values, first, shades)
        return levels
    function = str(header.get("VOILUTFunction") or "").strip().upper()
    function = function if function in ("SIGMOID", "LINEAR_EXACT") else "LINEAR"
    header_centre, header_width = _first_number(header.get("WindowCenter")), _first_number(header.get("WindowWidth"))
    if (
        header_centre is not None
        and header_width is not None
        and _is_valid_window(header_centre, header_width, function)
    ):
        steps.append(f"window {header_centre:g}/{header_width:g}, the header's")
        return _apply_window(values, header_centre, header_width, function, luts)
    left, top, right, bottom = box
    part = values[top:bottom, left:right]
    counted = part if padding is None else part[~padding[top:bottom, left:right]]
    low, high = np.percentile(counted if counted.size else part, _PERCENTILES)
    steps.append(f"{low:g} to {high:g}, the {_PERCENTILES[0]:g} to {_PERCENTILES[1]:g} percentile")
    if high > low:
        _record_window(luts, (low + high + 1) / 2, high - low + 1, "LINEAR")
        levels = (values - low) / (high - low)
        return levels.clip(0, 1)
    _record_window(luts, float(values.max()) + 1, 1, "LINEAR")  # all values are below this window
    return np.zeros_like(values)


def _first_number(value: Any) -> float | None:
    """Return the first number of an attribute with one or several values; None if it is missing or empty."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    return None if value in (None, "") else float(value)


def _is_valid_window(centre: float, width: float, function: str) -> bool:
    return math.isfinite(centre) and math.isfinite(width) and (width >= 1 if function == "LINEAR" else width > 0)


def _apply_window(values: Floats, centre: float, width: float, function: str, luts: Dataset) -> Floats:
    """Map values to [0, 1] by a window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    _record_window(luts, centre, width, function)
    if function == "SIGMOID":
        sigmoid: Floats = 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
        return sigmoid
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _record_window(luts: Dataset, centre: float, width: float, function: str) -> None:
    luts.WindowCenter, luts.WindowWidth = _decimal_string(centre), _decimal_string(width)
    luts.VOILUTFunction = function


def _decimal_string(value: float) -> str:
    """Format a number for VR DS, which holds 16 characters."""
    return f"{value:.10g}"
