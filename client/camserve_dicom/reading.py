"""Rendering of a DICOM image as the 8-bit pixels that the model gets."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

from camserve_dicom import colour, greyscale, part10
from camserve_dicom.decoding import JPEG_PROGRESSIVE, JPEG_XL_JPEG, decode_frame, truncated
from camserve_dicom.errors import DicomError
from camserve_dicom.object_classes import kind_of_non_image
from camserve_dicom.source_header import frame_header, pixel_aspect

__all__ = ["Box", "RenderedImage", "Source", "Window", "read", "silence_library_warnings"]

Source: TypeAlias = "str | PathLike[str] | BinaryIO | Dataset"
"""A DICOM image: a path, a binary file, or a pydicom dataset with pixels and `file_meta`."""
Window: TypeAlias = tuple[float, float]
"""(centre, width) of a window, as Window Center and Window Width (PS3.3 C.11.2.1.2)."""
Box: TypeAlias = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels. Right and bottom are exclusive."""

_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_GROUP = 0x7FE0
_PIXEL_ATTRIBUTES = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Region Spatial Format 2D (PS3.3 C.8.5.5.1.1). Other regions contain curves and scales.
_FORMAT_2D = 1
# These processes are always lossy. Other transfer syntaxes may be either.
_LOSSY_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, *JPEG_PROGRESSIVE, JPEG_XL_JPEG)
# A larger ratio is an error in the header. Resampling such an image could exhaust the memory.
_MAX_PIXEL_ASPECT = 10.0
# Exceptions that pydicom and numpy raise for invalid values.
_HEADER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True, eq=False)
class RenderedImage:
    """One frame of a DICOM image, rendered as it is displayed.

    Attributes:
        pixels: Grey levels uint8 [H, W], or RGB uint8 [H, W, 3].
        source: The complete header without pixel data.
        frame: Number of the frame, counted from 0.
        steps: Descriptions of the steps from stored values to `pixels`.
        box: The part of the frame that `pixels` show, in stored pixels. It is the whole frame unless it was cropped.
        content: The smallest box around everything that is not background, in pixels of `pixels`.
        luts: The applied modality LUT and VOI LUT or window, as attributes of a presentation state.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    source: Dataset = field(repr=False)  # repr must not copy patient data into a log
    frame: int
    steps: tuple[str, ...]
    box: Box
    content: Box
    luts: Dataset = field(repr=False)


def silence_library_warnings() -> None:
    """Silence the warnings and log messages of pydicom, highdicom and fpdf2, which quote values of headers."""
    for module in ("pydicom", "highdicom", "fpdf", "fontTools"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        logging.getLogger(module).setLevel(logging.CRITICAL + 1)


def read(
    source: Source,
    *,
    frame: int = 0,
    window: Window | None = None,
    regions: Literal["refuse", "crop", "ignore"] = "refuse",
    burned_in: Literal["refuse", "ignore"] = "refuse",
    non_image: Literal["refuse", "ignore"] = "refuse",
) -> RenderedImage:
    """Render one frame of a DICOM image. Nothing is sent to a server.

    Args:
        source: A path, a binary file, or a pydicom dataset, which is not changed.
        frame: Number of the frame, counted from 0.
        window: (centre, width) of the rescaled values, such as the window of the model's training data. The default is
            the VOI LUT or first window of the header or, without both, the 0.5 to 99.5 percentile.
        regions: What to do with an image that has ultrasound regions. Outside of them there is text, often a name.
            "refuse" raises an error, "crop" keeps only the largest 2D region, "ignore" keeps everything.
        burned_in: What to do with an image whose Burned In Annotation is YES. "refuse" raises an error, "ignore"
            accepts it. An image that was cropped to a region is always accepted.
        non_image: What to do with an object whose values are not an image, such as a segmentation or a dose. "refuse"
            raises an error, "ignore" explains it like an image.

    Returns:
        The rendered frame, with square pixels.

    Raises:
        DicomError: If the object is not a supported image, or is refused. `reason` says why.
        OSError: If the file cannot be read.
        ValueError: If `regions`, `burned_in` or `non_image` has another value.
    """
    if regions not in ("refuse", "crop", "ignore"):
        raise ValueError(f"regions is {regions!r}; expected 'refuse', 'crop' or 'ignore'")
    if burned_in not in ("refuse", "ignore"):
        raise ValueError(f"burned_in is {burned_in!r}; expected 'refuse' or 'ignore'")
    if non_image not in ("refuse", "ignore"):
        raise ValueError(f"non_image is {non_image!r}; expected 'refuse' or 'ignore'")
    dataset = source if isinstance(source, Dataset) else _parse_file(source)
    _require_image(dataset, non_image)
    with _report_header_errors():
        if "HighBit" in dataset and int(dataset.HighBit) != int(dataset.BitsStored) - 1:
            raise DicomError("High Bit is not Bits Stored - 1, as PS3.3 C.7.6.3.1 requires", "UNSUPPORTED_PIXELS")
        frames = int(dataset.get("NumberOfFrames") or 1)
        box = _displayed_box(dataset, regions, burned_in)
    if not 0 <= frame < frames:
        raise DicomError(f"frame is {frame}; expected 0 to {frames - 1}", "FRAME_OUT_OF_RANGE", field="frame")
    stored = decode_frame(dataset, frame)
    if min(stored.shape[:2]) < 2:
        raise DicomError("the image has a single row or column; expected at least two", "UNSUPPORTED_PIXELS")
    steps: list[str] = []
    with _report_header_errors():
        header = frame_header(dataset, frame)
        padding, luts = None, Dataset()
        if stored.ndim == 2 and dataset.PhotometricInterpretation != "PALETTE COLOR":
            pixels, padding, luts = greyscale.render(stored, header, window, box, steps)
        else:
            pixels = colour.render(stored, dataset, steps)
        if box != (0, 0, stored.shape[1], stored.shape[0]):
            steps.append("cropped to {}, {}, {}, {}".format(*box))
        left, top, right, bottom = box
        pixels = pixels[top:bottom, left:right]
        content = _content_box(pixels, None if padding is None else padding[top:bottom, left:right])
        pixels, content = _resample_to_square_pixels(pixels, content, header, steps)
    return RenderedImage(pixels, _header_without_pixels(dataset), frame, tuple(steps), box, content, luts)


def _require_image(dataset: Dataset, non_image: str) -> None:
    """Raise DicomError unless the object is an image with the attributes that results need."""
    if "DirectoryRecordSequence" in dataset:
        raise DicomError("the file is a DICOMDIR, a list of files; pass an image file", "NO_PIXELS")
    if not any(name in dataset and dataset[name].value for name in _PIXEL_ATTRIBUTES):
        raise DicomError("the object has no pixels; expected an image", "NO_PIXELS")
    if dataset.get("Manufacturer") == "camserve":
        raise DicomError("camserve has made the object; pass the original image instead of a result", "OWN_RESULT")
    if non_image == "refuse" and (kind := kind_of_non_image(dataset)):
        raise DicomError(
            f'the object is a {kind}, whose values are not an image; non_image="ignore" explains it anyway',
            "NOT_AN_IMAGE",
            field="non_image",
        )
    if missing := [name for name in _REQUIRED if not dataset.get(name)]:
        raise DicomError(f"the object has no {missing[0]}, which the results must reference", "INCOMPLETE")


def _parse_file(source: str | PathLike[str] | BinaryIO) -> Dataset:
    """Parse a DICOM file, and raise DicomError if it is not one or is truncated."""
    try:
        dataset = part10.parse(source)
        if _is_truncated(dataset):
            raise truncated()
        return dataset
    except DicomError:
        raise
    except InvalidDicomError as error:
        raise DicomError(
            "the file is not DICOM: it begins neither with a preamble and DICM nor with DICOM elements", "NOT_DICOM"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise truncated() from error  # pydicom raises an OSError without errno at an unexpected end of file
    except Exception as error:  # a corrupt file can raise any exception in the parser
        raise DicomError("the file cannot be parsed: it is corrupt or truncated", "TRUNCATED") from error


def _is_truncated(dataset: Dataset) -> bool:
    """Return True if the file ends within an element. pydicom returns no element if a sequence does not end."""
    if not len(dataset):
        return True
    last = dataset.get_item(max(dataset.keys()))
    if not isinstance(last, RawDataElement) or last.value is None or last.length == _UNDEFINED_LENGTH:
        return False
    return len(last.value) < last.length


def _header_without_pixels(dataset: Dataset) -> Dataset:
    """Return a copy of the header, with Lossy Image Compression set if the transfer syntax is lossy."""
    header = Dataset()
    header.update({tag: dataset.get_item(tag) for tag in dataset.keys() if tag.group != _PIXEL_GROUP})  # noqa: SIM118 - a Dataset yields elements
    implicit, little = dataset.original_encoding
    header.set_original_encoding(implicit, little, dataset.original_character_set)
    if dataset.file_meta.TransferSyntaxUID in _LOSSY_SYNTAXES and not header.get("LossyImageCompression"):
        header.LossyImageCompression = "01"
    return header


@contextmanager
def _report_header_errors() -> Iterator[None]:
    """Convert exceptions that invalid header values cause to DicomError."""
    try:
        yield
    except DicomError:
        raise
    except _HEADER_ERRORS as error:
        raise DicomError("an attribute or lookup table of the header has an invalid value", "BROKEN_HEADER") from error


def _displayed_box(dataset: Dataset, regions: str, burned_in: str) -> Box:
    """Return the part of the frame to render, and raise DicomError if the image may show a name."""
    whole = (0, 0, int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0))
    ultrasound_regions = list(dataset.get("SequenceOfUltrasoundRegions") or [])
    if ultrasound_regions and regions == "crop":
        boxes = [_region_box(region, whole) for region in ultrasound_regions]
        candidates = [box for box, is_2d in boxes if is_2d] or [box for box, _ in boxes]
        return max(candidates, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    if str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES" and burned_in == "refuse":
        raise DicomError(
            "the image has text burned into its pixels (Burned In Annotation is YES), which may identify the patient; "
            'burned_in="ignore" sends it anyway',
            "BURNED_IN_ANNOTATION",
            field="burned_in",
        )
    if ultrasound_regions and regions == "refuse":
        raise DicomError(
            "the image has ultrasound regions, and the pixels outside of them may identify the patient; "
            'regions="crop" sends only the largest region, regions="ignore" sends the whole image',
            "ULTRASOUND_REGIONS",
            field="regions",
        )
    return whole


def _region_box(region: Dataset, whole: Box) -> tuple[Box, bool]:
    """Return the box of an ultrasound region, and True if it shows a 2D image (PS3.3 C.8.5.5.1)."""
    names = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    left, top, right, bottom = (int(region.get(name, -1)) for name in names)
    box = (max(left, 0), max(top, 0), min(right + 1, whole[2]), min(bottom + 1, whole[3]))
    if left < 0 or top < 0 or box[0] >= box[2] or box[1] >= box[3]:
        raise DicomError(
            'an ultrasound region lies outside of the image; regions="ignore" sends the whole image',
            "ULTRASOUND_REGIONS",
            field="regions",
        )
    return box, region.get("RegionSpatialFormat") == _FORMAT_2D


def _content_box(pixels: NDArray[np.uint8], padding: NDArray[np.bool_] | None) -> Box:
    """Return the box around all pixels that are neither padding nor dark; the whole image if there is none."""
    bright = (pixels if pixels.ndim == 2 else pixels.max(axis=2)) > 255 // 32
    if padding is not None:
        bright &= ~padding
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return (0, 0, pixels.shape[1], pixels.shape[0])
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _resample_to_square_pixels(
    pixels: NDArray[np.uint8], content: Box, header: Dataset, steps: list[str]
) -> tuple[NDArray[np.uint8], Box]:
    """Enlarge the image along one axis so that its pixels are square, and scale the content box."""
    aspect = pixel_aspect(header)
    if abs(aspect - 1) < 1e-3:
        return pixels, content
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        raise DicomError(
            f"pixels are more than {_MAX_PIXEL_ASPECT:g} times as long in one direction as in the other; check Pixel "
            "Spacing and Pixel Aspect Ratio",
            "UNSUPPORTED_PIXELS",
        )
    height, width = pixels.shape[:2]
    size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
    steps.append(f"resampled to square pixels, {width}x{height} to {size[0]}x{size[1]}")
    resized = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BILINEAR)
    x, y = size[0] / width, size[1] / height
    left, top, right, bottom = content
    scaled = (
        int(left * x),
        int(top * y),
        min(int(np.ceil(right * x)), size[0]),
        min(int(np.ceil(bottom * y)), size[1]),
    )
    return np.asarray(resized, dtype=np.uint8), scaled
