"""Colour rendering: RGB, YBR and palettes as 8-bit RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, JPEG2000TransferSyntaxes

from camserve_dicom import lookup_tables
from camserve_dicom.errors import DicomError

__all__ = ["render"]


def render(stored: NDArray[Any], dataset: Dataset, steps: list[str]) -> NDArray[np.uint8]:
    """Render decoded values of a colour image as 8-bit RGB.

    Args:
        stored: Decoded values [H, W] of a palette, or [H, W, 3] of a colour image.
        dataset: The header, with `file_meta`.
        steps: A list to which the function appends a description of each step.

    Returns:
        RGB values uint8 [H, W, 3].

    Raises:
        DicomError: If the photometric interpretation is not supported.
    """
    interpretation = str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    if interpretation == "PALETTE COLOR":
        stored, bits = _apply_palette(stored, dataset)
        steps.append("palette")
    elif (
        stored.ndim != 3
        or stored.shape[-1] != 3
        or not _decodes_to_rgb(interpretation, dataset.file_meta.TransferSyntaxUID)
    ):
        raise DicomError(
            "the photometric interpretation is not supported with this transfer syntax; expected MONOCHROME1, "
            "MONOCHROME2, PALETTE COLOR, RGB, YBR_FULL or YBR_FULL_422, or in JPEG 2000 YBR_ICT or YBR_RCT",
            "UNSUPPORTED_PIXELS",
        )
    elif interpretation != "RGB":
        steps.append("YBR to RGB")
    if bits == 8:
        return stored.astype(np.uint8)
    steps.append(f"{bits} bits to 8")
    levels: NDArray[np.float64] = stored.astype(np.float64) * (255 / float(2**bits - 1))
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def _decodes_to_rgb(interpretation: str, syntax: UID) -> bool:
    """Return True if decoded values are RGB. Only JPEG 2000 decoders invert the transforms ICT and RCT."""
    return interpretation in ("RGB", "YBR_FULL", "YBR_FULL_422") or (
        interpretation in ("YBR_ICT", "YBR_RCT") and syntax in JPEG2000TransferSyntaxes
    )


def _apply_palette(stored: NDArray[Any], dataset: Dataset) -> tuple[NDArray[Any], int]:
    """Return the colours [H, W, 3] of palette indices, and the number of bits of the colours."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        colours = apply_color_lut(stored, dataset)[..., :3]
        return colours, 8 * colours.dtype.itemsize
    little_endian = dataset.file_meta.TransferSyntaxUID.is_little_endian
    bits, channels = 8, []
    for name in ("Red", "Green", "Blue"):
        descriptor = dataset[f"{name}PaletteColorLookupTableDescriptor"].value
        table = lookup_tables.table_entries(
            descriptor, dataset[f"{name}PaletteColorLookupTableData"], little_endian=little_endian
        )
        if int(descriptor[2]) != 8 or table.max() > 255:
            bits = max(bits, 8 * table.dtype.itemsize)
        first = lookup_tables.first_mapped_value(descriptor, signed=bool(dataset.PixelRepresentation))
        channels.append(lookup_tables.apply_table(stored, first, table))
    return np.stack(channels, axis=-1), bits
