"""Decoding of stored pixel values, and errors that name the missing decoder."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID

from camserve_dicom.errors import DicomError

__all__ = ["JPEG_PROGRESSIVE", "JPEG_XL", "JPEG_XL_JPEG", "decode_frame", "truncated"]

_EXTRA = "pip install 'camserve[dicom]', which includes "
JPEG_PROGRESSIVE = (UID("1.2.840.10008.1.2.4.53"), UID("1.2.840.10008.1.2.4.55"))
"""Retired transfer syntaxes of JPEG: spectral selection, and full progression."""
JPEG_XL_JPEG = UID("1.2.840.10008.1.2.4.111")
"""JPEG XL of an image that was JPEG Baseline."""
JPEG_XL = (UID("1.2.840.10008.1.2.4.110"), JPEG_XL_JPEG, UID("1.2.840.10008.1.2.4.112"))
"""Transfer syntaxes of JPEG XL, the first of which is lossless."""
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", *JPEG_PROGRESSIVE)
# Names of transfer syntaxes that pydicom does not know.
_NAMES = {
    JPEG_XL[0]: "JPEG XL Lossless",
    JPEG_XL[1]: "JPEG XL JPEG Recompression",
    JPEG_XL[2]: "JPEG XL",
    "1.2.840.10008.1.2.1.98": "Encapsulated Uncompressed Explicit VR Little Endian",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
_REMEDIES = {
    **dict.fromkeys([*_JPEG, *JPEG_XL], _EXTRA + "imagecodecs"),
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A value of '?None'? for")  # an empty Number of Frames means one frame
            # pydicom raises different errors for pixel data that is too short. This check reports all of them as
            # truncated.
            if (
                syntax.is_transfer_syntax
                and not syntax.is_compressed
                and "PixelData" in dataset
                and len(dataset.PixelData) < get_expected_length(dataset)
            ):
                raise truncated()
            if syntax in JPEG_XL or syntax in JPEG_PROGRESSIVE or (syntax in _JPEG and dataset.BitsStored > 8):
                return _decode_with_imagecodecs(dataset, frame, syntax)
            return pixel_array(dataset, index=frame)
    except DicomError:
        raise
    except BaseException as error:
        # pylibjpeg-rle is written in Rust. If it fails, it raises PanicException, which is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _decoding_error(dataset, syntax, error) from error
        raise


def _decode_with_imagecodecs(dataset: Dataset, frame: int, syntax: UID) -> NDArray[Any]:
    """Decode JPEG with 12 bits or progression, or JPEG XL. pydicom has no decoder for them without GPL software."""
    try:
        import imagecodecs
    except ImportError:
        raise NotImplementedError("imagecodecs is not installed") from None
    encoded = get_frame(dataset.PixelData, frame, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    if syntax in JPEG_XL:
        decoded = imagecodecs.jpegxl_decode(encoded)
    elif dataset.PhotometricInterpretation == "RGB":
        decoded = imagecodecs.jpeg8_decode(encoded, colorspace="RGB", outcolorspace="RGB")
    else:
        decoded = imagecodecs.jpeg8_decode(encoded)
    shape = (int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel))
    if decoded.shape != shape[: decoded.ndim] or decoded.size != math.prod(shape):
        raise ValueError(f"the decoded pixels have the shape {decoded.shape}; the header says {shape}")
    bits = int(dataset.BitsStored)
    # The lossy transform may exceed the range of the stored bits.
    clipped = decoded.clip(None, 2**bits - 1)
    if not dataset.PixelRepresentation:
        return np.asarray(clipped)
    signed = clipped.astype(np.int32)
    return np.asarray(np.where(signed < 2 ** (bits - 1), signed, signed - 2**bits))


def truncated() -> DicomError:
    """Return the error for an object that ends too early."""
    return DicomError("the object is truncated: it ends before the end of its pixels", "TRUNCATED")


def _decoding_error(dataset: Dataset, syntax: UID, error: BaseException) -> DicomError:
    """Return the DicomError for an exception of pydicom's decoders."""
    text = str(error)
    if isinstance(error, AttributeError) or "required element" in text or "missing required" in text:
        return DicomError(
            "the object lacks attributes of the Image Pixel module, which say how its pixels are encoded",
            "UNSUPPORTED_PIXELS",
        )
    is_known = syntax.is_transfer_syntax or syntax in _REMEDIES
    no_decoder = isinstance(error, NotImplementedError) or "missing dependencies" in text or "no decoder" in text
    is_compressed = syntax in _REMEDIES or (syntax.is_transfer_syntax and syntax.is_compressed)
    if is_known and not no_decoder and is_compressed:
        return DicomError("the pixels cannot be decoded: they are corrupt or truncated", "UNREADABLE_PIXELS")
    if is_known and not is_compressed:
        return DicomError(
            "the pixels cannot be decoded: the attributes of the Image Pixel module contradict each other",
            "UNREADABLE_PIXELS",
        )
    remedy = _REMEDIES.get(syntax, "camserve supports no package that decodes it; convert the image")
    if syntax in _NAMES:
        name = _NAMES[syntax]
    elif syntax.is_transfer_syntax and not syntax.is_private:
        name = syntax.name
    elif syntax.startswith("1.2.840.10008."):
        name = f"{syntax}, which is not a transfer syntax that camserve knows"
    else:
        name = "a private transfer syntax"
    return DicomError(f"the pixels are compressed as {name}: {remedy}", "UNSUPPORTED_TRANSFER_SYNTAX")
