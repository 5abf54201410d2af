"""Access to the header of a source image: attributes of one frame, and geometry of its pixels."""

from __future__ import annotations

from collections.abc import Sequence

from pydicom import DataElement, Dataset
from pydicom.errors import BytesLengthException

__all__ = ["frame_header", "pixel_aspect", "readable_element", "spacing"]


def frame_header(dataset: Dataset, frame: int) -> Dataset:
    """Return the header with the attributes of one frame at the top level.

    Enhanced objects store them in the Shared and Per-Frame Functional Groups Sequences (PS3.3 C.7.6.16).

    Args:
        dataset: The header of a single-frame or multi-frame image.
        frame: Number of the frame, counted from 0.
    """
    header = Dataset()
    header.update(dataset)
    if hasattr(dataset, "file_meta"):
        header.file_meta = dataset.file_meta  # has the transfer syntax, and with it the byte order of lookup tables
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    per_frame = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*shared, *per_frame):
        for element in group:
            if element.VR == "SQ" and len(element.value) == 1:
                header.update(element.value[0])
    return header


def readable_element(header: Dataset, name: str) -> DataElement | None:
    """Return an element, or None if it is missing or its value cannot be parsed, such as the number "63,2"."""
    try:
        return header[name]
    except (KeyError, TypeError, ValueError, OverflowError, BytesLengthException):
        return None


def spacing(header: Dataset, *names: str) -> tuple[float, float] | None:
    """Return the distance between rows and the distance between columns.

    Args:
        header: The header of one frame.
        names: Keywords of attributes with two positive numbers, such as "PixelSpacing". The first valid one counts.

    Returns:
        (vertical, horizontal) in the unit of the attribute (mm for Pixel Spacing), or None if no attribute is valid.
    """
    for name in names:
        value = header.get(name)
        if isinstance(value, Sequence | list) and len(value) == 2:
            vertical, horizontal = map(float, value)
            if vertical > 0 and horizontal > 0:
                return vertical, horizontal
    return None


def pixel_aspect(header: Dataset) -> float:
    """Return the height of a pixel divided by its width; 1 if the header has no valid spacing."""
    names = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
    vertical, horizontal = spacing(header, *names) or (1.0, 1.0)
    return vertical / horizontal
