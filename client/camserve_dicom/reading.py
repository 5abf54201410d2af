"""From a DICOM object to the picture that is sent: pixels alone, as people see them."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import PIL.Image
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGBaseline8Bit, JPEGExtended12Bit

from camserve_dicom import grey, lookup_tables
from camserve_dicom.errors import DicomError

__all__ = ["Box", "RenderedImage", "Source", "Window", "pixels_of_frame", "read", "silence_library_warnings"]

# A path, a binary file, or a dataset with its pixels and its file_meta.
Source: TypeAlias = "str | PathLike[str] | BinaryIO | Dataset"
# (centre, width), as in Window Center and Window Width.
Window: TypeAlias = tuple[float, float]
# (left, top, right, bottom) in pixels, right and bottom behind the last.
Box: TypeAlias = tuple[int, int, int, int]

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_UNDEFINED = 0xFFFFFFFF
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Spatial formats of ultrasound regions: 2D is the picture, others are curves and scales.
_FORMAT_2D = 1
# JPEG; others of its kind may be without loss.
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit)
# What is more elongated than this is a broken header, and would fill the memory.
_MOST_ELONGATED = 10.0


@dataclass(frozen=True, eq=False)
class RenderedImage:
    """One frame as people see it: `pixels`, uint8 [H, W], or [H, W, 3] in colour.

    `source` is the whole header, without pixels, and `frame` counts from 0. `steps` say how the pixels were made of the
    stored values. `box` is the part of the frame that they show, in stored pixels; all of it unless it was cropped.
    `content` is the box of what is not background, in pixels of the picture. `luts` are the modality and VOI LUT that
    were applied, as attributes of a presentation state.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    source: Dataset = field(repr=False)  # nothing of it in a log
    frame: int
    steps: tuple[str, ...]
    box: Box
    content: Box
    luts: Dataset = field(repr=False)


def silence_library_warnings() -> None:
    """Silence pydicom's and highdicom's remarks in this process: they quote what is in headers."""
    for module in ("pydicom", "highdicom"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        logging.getLogger(module).setLevel(logging.CRITICAL + 1)


def read(
    source: Source,
    *,
    frame: int = 0,
    window: Window | None = None,
    regions: Literal["refuse", "crop", "ignore"] = "refuse",
    burned_in: Literal["refuse", "ignore"] = "refuse",
) -> RenderedImage:
    """A frame of a DICOM image as a picture. Nothing of it leaves this machine.

    source: a path, a binary file, or a pydicom dataset, which is not changed.
    frame: of several, from 0.
    window: (centre, width) of the grey levels, such as what the model was trained with, instead of the header's; where
        that has none either, the 0.5 to 99.5 percentile is shown.
    regions: what to do with an ultrasound image whose header says where its regions are, outside of which there is
        text, often a name: "crop" to the largest region, or "ignore" them.
    burned_in: what to do with an image whose header says that it has text burned in. Cropping to a region settles it,
        too.

    Raises OSError for a file that cannot be read, DicomError for what is no such image or is refused.
    """
    if regions not in ("refuse", "crop", "ignore") or burned_in not in ("refuse", "ignore"):
        raise ValueError("regions is refuse, crop or ignore, and burned_in is refuse or ignore")
    dataset = source if isinstance(source, Dataset) else _parsed(source)
    if missing := [name for name in _NEEDED if not dataset.get(name)]:
        raise DicomError(f"the object has no {missing[0]}, which its results refer to", "INCOMPLETE")
    if not any(name in dataset for name in _PIXELS):
        raise DicomError("the object has no pixels: it is no image", "NO_PIXELS")
    if dataset.get("Manufacturer") == "camserve":
        raise DicomError("camserve has made the object: it is a result, and no source", "OWN_RESULT")
    with _sound():
        if "HighBit" in dataset and int(dataset.HighBit) != int(dataset.BitsStored) - 1:
            raise DicomError("High Bit is not Bits Stored - 1: which bits are the pixels?", "UNSUPPORTED_PIXELS")
        frames = int(dataset.get("NumberOfFrames") or 1)
        box = _part(dataset, regions, burned_in)
    if not 0 <= frame < frames:
        raise DicomError(
            f"there is no frame {frame}: the image has {frames}, counted from 0", "FRAME_OUT_OF_RANGE", field="frame"
        )
    stored = pixels_of_frame(dataset, frame)
    if min(stored.shape[:2]) < 2:
        raise DicomError("an image of a single row or column shows nothing", "UNSUPPORTED_PIXELS")
    steps: list[str] = []
    with _sound():
        header = grey.of_frame(dataset, frame)
        padding, luts = None, Dataset()
        if stored.ndim == 2 and dataset.PhotometricInterpretation != "PALETTE COLOR":
            shown, padding, luts = grey.shown(stored, header, window, box, steps)
        else:
            shown = _colour(stored, dataset, steps)
        if box != (0, 0, stored.shape[1], stored.shape[0]):
            steps.append("cropped to {}, {}, {}, {}".format(*box))
        left, top, right, bottom = box
        shown = shown[top:bottom, left:right]
        content = _content(shown, None if padding is None else padding[top:bottom, left:right])
        shown, content = _square(shown, content, header, steps)
    return RenderedImage(shown, _header(dataset), frame, tuple(steps), box, content, luts)


# ---- the object -----------------------------------------------------------------------------------------------------


def _parsed(source: str | PathLike[str] | BinaryIO) -> Dataset:
    try:
        dataset = pydicom.dcmread(source)
        if _is_cut(dataset):
            raise _truncated()
        return dataset
    except DicomError:
        raise
    except InvalidDicomError as error:
        raise DicomError("the file is not DICOM: it has no DICM after its preamble", "NOT_DICOM") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _truncated() from error  # pydicom's own, for an end of file within an element
    except Exception as error:  # whatever a broken file makes of a parser
        raise DicomError("the file cannot be parsed: it is broken, or truncated", "TRUNCATED") from error


_BROKEN = (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError, struct.error)


def _header(dataset: Dataset) -> Dataset:
    """All but the pixels; and that they have lost something, which not all say whose transfer syntax does."""
    bare = Dataset()
    bare.update({tag: dataset.get_item(tag) for tag in dataset.keys() if tag.group != 0x7FE0})  # noqa: SIM118 - a Dataset yields elements
    implicit, little = dataset.original_encoding
    bare.set_original_encoding(implicit, little, dataset.original_character_set)
    if dataset.file_meta.TransferSyntaxUID in _LOSSY and not bare.get("LossyImageCompression"):
        bare.LossyImageCompression = "01"
    return bare


@contextmanager
def _sound() -> Iterator[None]:
    """What a broken header makes of those who read it becomes a DicomError."""
    try:
        yield
    except DicomError:
        raise
    except _BROKEN as error:
        raise DicomError("an attribute of the header, or a lookup table in it, is broken", "BROKEN_HEADER") from error


def _is_cut(dataset: Dataset) -> bool:
    """Whether it ends within an element; of a sequence without an end pydicom leaves nothing at all."""
    if not len(dataset):
        return True
    last = dataset.get_item(max(dataset.keys()))
    if not isinstance(last, RawDataElement) or last.value is None or last.length == _UNDEFINED:
        return False
    return len(last.value) < last.length


def _truncated() -> DicomError:
    return DicomError("the object is truncated: it ends before its pixels do", "TRUNCATED")


def pixels_of_frame(dataset: Dataset, frame: int) -> NDArray[Any]:
    """The stored values of one frame, [H, W] or [H, W, samples], YBR turned into RGB."""
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None:
        raise DicomError("the dataset has no file_meta.TransferSyntaxUID: how are its pixels stored?", "INCOMPLETE")
    try:
        # pydicom speaks of fewer bytes in words of several kinds.
        known = syntax.is_transfer_syntax
        if (
            known
            and not syntax.is_compressed
            and "PixelData" in dataset
            and len(dataset.PixelData) < get_expected_length(dataset)
        ):
            raise _truncated()
        return pixel_array(dataset, index=frame)
    except DicomError:
        raise
    except Exception as error:
        raise _undecoded(dataset, syntax, error) from error


def _undecoded(dataset: Dataset, syntax: UID, error: Exception) -> DicomError:
    said = str(error)
    if isinstance(error, AttributeError) or "required element" in said or "missing required" in said:
        return DicomError("the object lacks attributes that say how its pixels are stored", "UNSUPPORTED_PIXELS")
    unsupported = isinstance(error, NotImplementedError) or "missing dependencies" in said or "no decoder" in said
    known = syntax.is_transfer_syntax
    if (
        known
        and not unsupported
        and syntax.is_compressed
        and int(dataset.get("BitsStored", 8)) <= _DEPTHS.get(syntax, 16)
    ):
        return DicomError("the pixels cannot be decoded: they are broken, or truncated", "UNREADABLE_PIXELS")
    if known and not syntax.is_compressed:
        return DicomError("the pixels cannot be decoded: their attributes contradict each other", "UNREADABLE_PIXELS")
    hint = _PACKAGES.get(syntax, "no package that camserve can use decodes it")
    name = syntax.name if known and not syntax.is_private else "a private transfer syntax"
    return DicomError(f"the pixels are compressed as {name}: {hint}", "UNSUPPORTED_TRANSFER_SYNTAX")


_GPL = "12 bits of it need pylibjpeg-libjpeg, which is GPL and therefore not among camserve's own: pip install it"
_EXTRA = "pip install 'camserve[dicom]', which brings "
# The deepest pixels that the extra's packages decode, where that is less than 16 bits.
_DEPTHS = {"1.2.840.10008.1.2.4.50": 8, "1.2.840.10008.1.2.4.51": 8}
_PACKAGES = {
    "1.2.840.10008.1.2.4.50": _EXTRA + "python-gdcm",
    "1.2.840.10008.1.2.4.51": _GPL,
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (57, 70, 80, 81)], _EXTRA + "python-gdcm"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)], _EXTRA + "pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.5": _EXTRA + "pylibjpeg-rle",
}


# ---- which part of it -----------------------------------------------------------------------------------------------


def _part(dataset: Dataset, regions: str, burned_in: str) -> Box:
    whole = (0, 0, int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0))
    described = list(dataset.get("SequenceOfUltrasoundRegions") or [])
    if described and regions == "crop":
        found = [_box(region, whole) for region in described]
        candidates = [box for box, is_2d in found if is_2d] or [box for box, _ in found]
        return max(candidates, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    if str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES" and burned_in == "refuse":
        raise DicomError(
            "the image has text burned into its pixels (Burned In Annotation YES), which may name the patient: "
            'burned_in="ignore" sends it all the same',
            "BURNED_IN_ANNOTATION",
            field="burned_in",
        )
    if described and regions == "refuse":
        raise DicomError(
            'the image has ultrasound regions, and outside of them maybe a name: regions="crop" sends the largest '
            'region, regions="ignore" all of it',
            "ULTRASOUND_REGIONS",
            field="regions",
        )
    return whole


def _box(region: Dataset, whole: Box) -> tuple[Box, bool]:
    names = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    left, top, right, bottom = (int(region.get(name, -1)) for name in names)
    box = (max(left, 0), max(top, 0), min(right + 1, whole[2]), min(bottom + 1, whole[3]))
    if left < 0 or top < 0 or box[0] >= box[2] or box[1] >= box[3]:
        raise DicomError("an ultrasound region lies outside of the image", "ULTRASOUND_REGIONS", field="regions")
    return box, region.get("RegionSpatialFormat") == _FORMAT_2D


# ---- as people see it -----------------------------------------------------------------------------------------------


def _colour(stored: NDArray[Any], dataset: Dataset, steps: list[str]) -> NDArray[np.uint8]:
    kind = str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    if kind == "PALETTE COLOR":
        stored, bits = _palette(stored, dataset)
        steps.append("palette")
    elif stored.ndim != 3 or stored.shape[-1] != 3 or not _is_rgb(kind, dataset.file_meta.TransferSyntaxUID):
        raise DicomError(
            "the photometric interpretation is none of today's standard, or not that of this transfer syntax",
            "UNSUPPORTED_PIXELS",
        )
    elif kind != "RGB":
        steps.append("YBR to RGB")
    if bits == 8:
        return stored.astype(np.uint8)
    steps.append(f"{bits} bits to 8")
    levels: NDArray[np.float64] = stored.astype(np.float64) * (255 / float(2**bits - 1))
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def _is_rgb(kind: str, syntax: UID) -> bool:
    """Whether decoding leaves RGB. The transforms of JPEG 2000 are undone only where there are any."""
    return kind in ("RGB", "YBR_FULL", "YBR_FULL_422") or (
        kind in ("YBR_ICT", "YBR_RCT") and syntax in JPEG2000TransferSyntaxes
    )


def _palette(stored: NDArray[Any], dataset: Dataset) -> tuple[NDArray[Any], int]:
    """Colours [H, W, 3], and how many bits they have."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        colours = apply_color_lut(stored, dataset)[..., :3]
        return colours, 8 * colours.dtype.itemsize
    little_endian = dataset.file_meta.TransferSyntaxUID.is_little_endian
    bits, channels = 8, []
    for name in ("Red", "Green", "Blue"):
        descriptor = dataset[f"{name}PaletteColorLookupTableDescriptor"].value
        table = lookup_tables.entries(
            descriptor, dataset[f"{name}PaletteColorLookupTableData"], little_endian=little_endian
        )
        if int(descriptor[2]) != 8 or table.max() > 255:
            bits = max(bits, 8 * table.dtype.itemsize)
        first = lookup_tables.first_mapped(descriptor, signed=bool(dataset.PixelRepresentation))
        channels.append(lookup_tables.looked_up(stored, first, table))
    return np.stack(channels, axis=-1), bits


def _content(shown: NDArray[np.uint8], padding: NDArray[np.bool_] | None) -> Box:
    """The box of what is neither padding nor as dark as background is; all of it where nothing is."""
    bright = (shown if shown.ndim == 2 else shown.max(axis=2)) > 255 // 32
    if padding is not None:
        bright &= ~padding
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return (0, 0, shown.shape[1], shown.shape[0])
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _square(shown: NDArray[np.uint8], content: Box, header: Dataset, steps: list[str]) -> tuple[NDArray[np.uint8], Box]:
    """Resampled so that pixels are square, along the axis that has fewer."""
    aspect = grey.pixel_aspect(header)
    if abs(aspect - 1) < 1e-3:
        return shown, content
    if not 1 / _MOST_ELONGATED <= aspect <= _MOST_ELONGATED:
        raise DicomError(
            f"pixels are more than {_MOST_ELONGATED:g} times as long as wide, says the header", "UNSUPPORTED_PIXELS"
        )
    height, width = shown.shape[:2]
    size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
    steps.append(f"resampled to square pixels, {width}x{height} to {size[0]}x{size[1]}")
    resized = PIL.Image.fromarray(shown).resize(size, PIL.Image.Resampling.BILINEAR)
    x, y = size[0] / width, size[1] / height
    left, top, right, bottom = content
    scaled = (
        int(left * x),
        int(top * y),
        min(int(np.ceil(right * x)), size[0]),
        min(int(np.ceil(bottom * y)), size[1]),
    )
    return np.asarray(resized, dtype=np.uint8), scaled
