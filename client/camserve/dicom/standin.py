"""What highdicom gets to see of the source: what it needs, in the form that it takes, and nothing of the patient.

Whatever is odd in the header, such as a blank character set, cannot stop it so. `header.finished` adds the rest.
"""

from __future__ import annotations

from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from camserve.dicom import grey
from camserve.dicom.derivation import Derivation

__all__ = ["geometry", "restored", "stand_in"]

_SAME = (
    "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


def geometry(derivation: Derivation) -> Dataset | None:
    """Where the plane lies in the patient; None where the header does not say."""
    header = grey.of_frame(derivation.picture.source, derivation.picture.frame)
    plane = [element for name in _PLANE if (element := grey.readable(header, name)) is not None]
    if [element.VM for element in plane] != [3, 6, 2] or not header.get("FrameOfReferenceUID"):
        return None
    found = Dataset()
    found.FrameOfReferenceUID = header.FrameOfReferenceUID
    found.PositionReferenceIndicator = header.get("PositionReferenceIndicator")
    thickness = grey.readable(header, "SliceThickness")
    try:
        for element in plane:
            setattr(found, element.keyword, [_number(each) for each in element.value])
        found.SliceThickness = _number(thickness.value if thickness and thickness.VM == 1 else 1)
    except (TypeError, ValueError):
        return None
    return found


def stand_in(derivation: Derivation) -> Dataset:
    """The frame as a single image in the source's place, with its geometry, or one made up.

    It is of a plain class, for highdicom wants more of others than every header has; `restored` puts the true one in.
    """
    source = derivation.picture.source
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
    return result


def restored(result: Dataset, derivation: Derivation, *, frames: bool = True) -> Dataset:
    """The result with references to the source instead of its stand-in, and to the frame."""
    source = derivation.picture.source
    for item in _references(result, str(source.SOPInstanceUID)):
        item.ReferencedSOPClassUID = source.SOPClassUID
        if frames and derivation.frame_number:
            item.ReferencedFrameNumber = derivation.frame_number
    return result


def _references(dataset: Dataset, uid: str) -> list[Dataset]:
    """All items in which the image is referred to, at any depth."""
    found = [dataset] if str(dataset.get("ReferencedSOPInstanceUID") or "") == uid else []
    for element in dataset:
        if element.VR == "SQ":
            found += [each for item in element.value for each in _references(item, uid)]
    return found


def _synthetic(derivation: Derivation) -> Dataset:
    """An upright plane at the origin of a frame of reference of its own."""
    made = Dataset()
    made.FrameOfReferenceUID = derivation.uid("synthetic frame of reference")
    made.PositionReferenceIndicator = None
    made.ImagePositionPatient = [0, 0, 0]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    aspect = grey.pixel_aspect(grey.of_frame(derivation.picture.source, derivation.picture.frame))
    made.PixelSpacing = [_number(aspect), 1]
    made.SliceThickness = 1
    return made


def _number(value: object) -> str:
    """As a decimal string, which holds 16 characters."""
    return f"{float(str(value)):.9g}"
