"""What highdicom gets to see of the source: what it needs, in the form that it takes, and nothing of the patient.

Whatever is odd in the header, such as a blank character set, cannot stop it so. `header.finished` adds the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from camserve_dicom import grey
from camserve_dicom.derivation import Derivation

__all__ = ["geometry", "restored", "stand_in", "thickness"]

_SAME = (
    "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
# How far from 1 the length of a direction may be, and from 0 the cosine between the two: headers round them.
_TOLERANCE = 0.01


def geometry(derivation: Derivation) -> Dataset | None:
    """Where the plane lies in the patient; None where the header does not say, or says what cannot be."""
    header = grey.of_frame(derivation.image.source, derivation.image.frame)
    plane = [element for name in _PLANE if (element := grey.readable(header, name)) is not None]
    if [element.VM for element in plane] != [3, 6, 2] or not header.get("FrameOfReferenceUID"):
        return None
    try:
        position, orientation, spacing = ([float(each) for each in element.value] for element in plane)
    except (TypeError, ValueError):
        return None
    directions = _unit(np.reshape(orientation, (2, 3)))
    if directions is None or min(spacing) <= 0 or not np.isfinite([*position, *spacing]).all():
        return None
    found = Dataset()
    found.FrameOfReferenceUID = header.FrameOfReferenceUID
    found.PositionReferenceIndicator = header.get("PositionReferenceIndicator")
    found.ImagePositionPatient = [_number(each) for each in position]
    found.ImageOrientationPatient = [_number(each) for each in directions.flat]
    found.PixelSpacing = [_number(each) for each in spacing]
    return found


def thickness(derivation: Derivation) -> str | None:
    """Of the slice, in mm; None where the header does not say."""
    header = grey.of_frame(derivation.image.source, derivation.image.frame)
    try:
        value = float(header.SliceThickness)
    except (AttributeError, TypeError, ValueError):
        return None
    return _number(value) if value > 0 else None


def _unit(directions: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The directions of rows and columns [2, 3] with a length of 1; None where they are no such directions."""
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    if not (abs(lengths - 1) < _TOLERANCE).all() or abs(np.dot(*directions)) >= _TOLERANCE:
        return None
    unit: NDArray[np.float64] = directions / lengths
    return unit


def stand_in(derivation: Derivation) -> Dataset:
    """The frame as a single image in the source's place, with its geometry, or one made up.

    It is of a plain class, for highdicom wants more of others than every header has; `restored` puts the true one in.
    """
    source = derivation.image.source
    result = Dataset()
    result.SOPClassUID = SecondaryCaptureImageStorage
    for name in _SAME:
        if name in source:
            result.add(source[name])
    for name in _EMPTY:
        setattr(result, name, None)
    if not str(source.PhotometricInterpretation).startswith("MONOCHROME"):
        result.SamplesPerPixel, result.PhotometricInterpretation = 3, "RGB"
    result.Modality = source.get("Modality") or "OT"
    result.update(geometry(derivation) or _synthetic(derivation))
    result.SliceThickness = thickness(derivation) or 1  # which highdicom insists on
    return result


def restored(result: Dataset, derivation: Derivation, *, frames: bool = True) -> Dataset:
    """The result with references to the source instead of its stand-in, and to the frame."""
    source = derivation.image.source
    for keyword, item in _references(result, "", str(source.SOPInstanceUID)):
        item.ReferencedSOPClassUID = source.SOPClassUID
        # Of what belongs to a series whole instances are named, but for presentation states.
        if frames and derivation.frame_number and keyword != "ReferencedInstanceSequence":
            item.ReferencedFrameNumber = derivation.frame_number
    return result


def _references(dataset: Dataset, keyword: str, uid: str) -> Iterator[tuple[str, Dataset]]:
    """All items in which the image is referred to, at any depth, each with the keyword of its sequence."""
    if str(dataset.get("ReferencedSOPInstanceUID") or "") == uid:
        yield keyword, dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _references(item, element.keyword, uid)


def _synthetic(derivation: Derivation) -> Dataset:
    """An upright plane at the origin of a frame of reference of its own."""
    made = Dataset()
    made.FrameOfReferenceUID = derivation.uid("synthetic frame of reference")
    made.PositionReferenceIndicator = None
    made.ImagePositionPatient = [0, 0, 0]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header = grey.of_frame(derivation.image.source, derivation.image.frame)
    spacing = grey.spacing(header, "PixelSpacing", "ImagerPixelSpacing") or (grey.pixel_aspect(header), 1.0)
    made.PixelSpacing = [_number(each) for each in spacing]
    return made


def _number(value: object) -> str:
    """As a decimal string, which holds 16 characters."""
    return f"{float(str(value)):.9g}"
