"""Decoding of stored pixel values, and errors that name the missing decoder."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID

from camserve_dicom.errors import DicomError

__all__ = ["decode_frame", "truncated"]

_GPL = "its 12-bit form needs pylibjpeg-libjpeg, which is GPL and not part of camserve: pip install pylibjpeg-libjpeg"
_EXTRA = "pip install 'camserve[dicom]', which includes "
# The largest number of bits that the extra's packages decode, where it is below 16.
_MAX_BITS = {"1.2.840.10008.1.2.4.50": 8, "1.2.840.10008.1.2.4.51": 8}
_REMEDIES = {
    "1.2.840.10008.1.2.4.50": _EXTRA + "python-gdcm",
    "1.2.840.10008.1.2.4.51": _GPL,
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (57, 70, 80, 81)], _EXTRA + "python-gdcm"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)], _EXTRA + "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.5": _EXTRA + "pylibjpeg-rle",
}


def decode_frame(dataset: Dataset, frame: int) -> NDArray[Any]:
    """Decode the stored values of one frame.

    Args:
        dataset: A DICOM image with `file_meta`.
        frame: Number of the frame, counted from 0.

    Returns:
        Stored values [H, W], or [H, W, samples] in colour, where YBR is converted to RGB.

    Raises:
        DicomError: If the pixels are truncated or cannot be decoded.
    """
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None:
        raise DicomError(
            "the dataset has no file_meta.TransferSyntaxUID, which defines the encoding of its pixels; set it",
            "INCOMPLETE",
        )
    try:
        # pydicom raises different errors for pixel data that is too short. This check reports all of them as truncated.
        if (
            syntax.is_transfer_syntax
            and not syntax.is_compressed
            and "PixelData" in dataset
            and len(dataset.PixelData) < get_expected_length(dataset)
        ):
            raise truncated()
        return pixel_array(dataset, index=frame)
    except DicomError:
        raise
    except Exception as error:
        raise _decoding_error(dataset, syntax, error) from error


def truncated() -> DicomError:
    """Return the error for an object that ends too early."""
    return DicomError("the object is truncated: it ends before the end of its pixels", "TRUNCATED")


def _decoding_error(dataset: Dataset, syntax: UID, error: Exception) -> DicomError:
    """Return the DicomError for an exception of pydicom's decoders."""
    text = str(error)
    if isinstance(error, AttributeError) or "required element" in text or "missing required" in text:
        return DicomError(
            "the object lacks attributes of the Image Pixel module, which say how its pixels are encoded",
            "UNSUPPORTED_PIXELS",
        )
    no_decoder = isinstance(error, NotImplementedError) or "missing dependencies" in text or "no decoder" in text
    is_standard = syntax.is_transfer_syntax
    if (
        is_standard
        and not no_decoder
        and syntax.is_compressed
        and int(dataset.get("BitsStored", 8)) <= _MAX_BITS.get(syntax, 16)
    ):
        return DicomError("the pixels cannot be decoded: they are corrupt or truncated", "UNREADABLE_PIXELS")
    if is_standard and not syntax.is_compressed:
        return DicomError(
            "the pixels cannot be decoded: the attributes of the Image Pixel module contradict each other",
            "UNREADABLE_PIXELS",
        )
    remedy = _REMEDIES.get(syntax, "camserve supports no package that decodes it; convert the image")
    name = syntax.name if is_standard and not syntax.is_private else "a private transfer syntax"
    return DicomError(f"the pixels are compressed as {name}: {remedy}", "UNSUPPORTED_TRANSFER_SYNTAX")
