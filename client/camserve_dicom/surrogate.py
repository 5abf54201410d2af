"""Surrogate source images for highdicom.

highdicom copies attributes from a source image and fails on some real headers, for example on an empty character set.
The surrogate has only the attributes that highdicom requires and no patient data. `result_header.complete` copies the
patient and study attributes from the source itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from camserve_dicom.derivation import Derivation
from camserve_dicom.source_header import frame_header, pixel_aspect, readable_element, spacing

__all__ = ["plane_geometry", "restore_references", "slice_thickness", "surrogate_source"]

_COPIED = (
    "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
# Headers contain rounded directions: their lengths may differ from 1, and their scalar product from 0, by this much.
_TOLERANCE = 0.01


def plane_geometry(derivation: Derivation) -> Dataset | None:
    """Return the attributes of the image plane in the patient (PS3.3 C.7.6.2); None if they are missing or invalid."""
    header = frame_header(derivation.image.source, derivation.image.frame)
    plane = [element for name in _PLANE if (element := readable_element(header, name)) is not None]
    if [element.VM for element in plane] != [3, 6, 2] or not header.get("FrameOfReferenceUID"):
        return None
    try:
        position, orientation, pixel_spacing = ([float(each) for each in element.value] for element in plane)
    except (TypeError, ValueError):
        return None
    directions = _unit_directions(np.reshape(orientation, (2, 3)))
    if directions is None or min(pixel_spacing) <= 0 or not np.isfinite([*position, *pixel_spacing]).all():
        return None
    geometry = Dataset()
    geometry.FrameOfReferenceUID = header.FrameOfReferenceUID
    geometry.PositionReferenceIndicator = header.get("PositionReferenceIndicator")
    geometry.ImagePositionPatient = [_decimal_string(each) for each in position]
    geometry.ImageOrientationPatient = [_decimal_string(each) for each in directions.flat]
    geometry.PixelSpacing = [_decimal_string(each) for each in pixel_spacing]
    return geometry


def slice_thickness(derivation: Derivation) -> str | None:
    """Return Slice Thickness in mm as a decimal string, or None if the header has no positive value."""
    header = frame_header(derivation.image.source, derivation.image.frame)
    try:
        value = float(header.SliceThickness)
    except (AttributeError, TypeError, ValueError):
        return None
    return _decimal_string(value) if value > 0 else None


def _unit_directions(directions: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Scale the directions of rows and columns [2, 3] to unit length; None if they are not orthogonal unit vectors."""
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    if not (abs(lengths - 1) < _TOLERANCE).all() or abs(np.dot(*directions)) >= _TOLERANCE:
        return None
    unit: NDArray[np.float64] = directions / lengths
    return unit


def surrogate_source(derivation: Derivation) -> Dataset:
    """Return a single-frame image with the identity and geometry of the source, for use by highdicom.

    The plane is synthetic if the source has no valid one. The SOP Class is Secondary Capture, because highdicom
    requires attributes for other classes that not every header has; `restore_references` corrects the references.
    """
    source = derivation.image.source
    result = Dataset()
    result.SOPClassUID = SecondaryCaptureImageStorage
    for name in _COPIED:
        if name in source:
            result.add(source[name])
    for name in _EMPTY:
        setattr(result, name, None)
    if not str(source.PhotometricInterpretation).startswith("MONOCHROME"):
        result.SamplesPerPixel, result.PhotometricInterpretation = 3, "RGB"
    result.Modality = source.get("Modality") or "OT"
    result.update(plane_geometry(derivation) or _synthetic_geometry(derivation))
    result.SliceThickness = slice_thickness(derivation) or 1  # highdicom requires one
    return result


def restore_references(result: Dataset, derivation: Derivation, *, frames: bool = True) -> Dataset:
    """Correct the references to the surrogate, so that they have the source's SOP Class and frame number.

    Args:
        result: A result that highdicom made. It is changed.
        derivation: The explanation and its image.
        frames: Set Referenced Frame Number. False if the result has it already.

    Returns:
        The result.
    """
    source = derivation.image.source
    for keyword, item in _references(result, "", str(source.SOPInstanceUID)):
        item.ReferencedSOPClassUID = source.SOPClassUID
        # Series reference whole instances. Presentation states use another sequence, which may name frames.
        if frames and derivation.frame_number and keyword != "ReferencedInstanceSequence":
            item.ReferencedFrameNumber = derivation.frame_number
    return result


def _references(dataset: Dataset, keyword: str, uid: str) -> Iterator[tuple[str, Dataset]]:
    """Yield all items that reference the image, at any depth, each with the keyword of its sequence."""
    if str(dataset.get("ReferencedSOPInstanceUID") or "") == uid:
        yield keyword, dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _references(item, element.keyword, uid)


def _synthetic_geometry(derivation: Derivation) -> Dataset:
    """Return an axial plane at the origin of a frame of reference that only this result uses."""
    geometry = Dataset()
    geometry.FrameOfReferenceUID = derivation.uid("synthetic frame of reference")
    geometry.PositionReferenceIndicator = None
    geometry.ImagePositionPatient = [0, 0, 0]
    geometry.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header = frame_header(derivation.image.source, derivation.image.frame)
    pixel_spacing = spacing(header, "PixelSpacing", "ImagerPixelSpacing") or (pixel_aspect(header), 1.0)
    geometry.PixelSpacing = [_decimal_string(each) for each in pixel_spacing]
    return geometry


def _decimal_string(value: object) -> str:
    """Format a number for VR DS, which holds 16 characters."""
    return f"{float(str(value)):.9g}"
