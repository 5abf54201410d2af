"""Attributes that all results share: copies from the source, UIDs, dates and equipment."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pydicom
from pydicom import Dataset
from pydicom.charset import python_encoding
from pydicom.dataset import FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, ExplicitVRLittleEndian

from camserve.version import __version__
from camserve_dicom.copied_attributes import copy_compression, copy_patient_and_study, copy_series
from camserve_dicom.derivation import IMPLEMENTATION_UID, NO_DATE, Derivation
from camserve_dicom.source_header import frame_header

__all__ = ["code", "complete", "encoded", "reference", "source_image"]

# pydicom decodes these character sets with codecs that allow more characters than the sets contain.
_ASCII = ("", "ISO_IR 6", "ISO 2022 IR 6", "ISO_IR 13", "ISO 2022 IR 13")
# Series numbers. Viewers list series in this order.
_SERIES_NUMBERS = {"sc": 9001, "sr": 9002, "pm": 9003, "seg": 9004, "gsps": 9005, "esr": 9006, "pdf": 9007}
_SERIES_NAMES = {
    "sc": "overlay",
    "sr": "report",
    "pm": "map",
    "seg": "segmentation",
    "gsps": "annotation",
    "esr": "report",
    "pdf": "report",
}


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """Return an item of a code sequence (PS3.3 8).

    Args:
        value: Code Value.
        scheme: Coding Scheme Designator.
        meaning: Code Meaning.
    """
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def reference(derivation: Derivation) -> Dataset:
    """Return a reference to the source, with the frame number of a multi-frame image."""
    source = derivation.image.source
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if derivation.frame_number:
        item.ReferencedFrameNumber = derivation.frame_number
    return item


def source_image(derivation: Derivation) -> Dataset:
    """Return an item of Source Image Sequence: a reference to the source with its purpose."""
    item = reference(derivation)
    item.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
    return item


def complete(result: Dataset, kind: str, derivation: Derivation) -> Dataset:
    """Add the attributes that all results share.

    Args:
        result: A result without patient and study attributes. It is changed.
        kind: The kind of the result, see `camserve_dicom.KINDS`.
        derivation: The explanation and its image.

    Returns:
        The complete object as it is read back from a file in Explicit VR Little Endian.
    """
    source = derivation.image.source
    copy_patient_and_study(source, result)
    copy_series(frame_header(source, derivation.image.frame), result, kind)
    if "PixelData" in result or "FloatPixelData" in result:
        copy_compression(source, result)
    result.SeriesInstanceUID = derivation.uid(f"{kind}/series")
    if "SOPInstanceUID" not in result:
        result.SOPInstanceUID = derivation.uid(kind)
    result.SeriesNumber, result.InstanceNumber = _SERIES_NUMBERS[kind], 1
    receipt = derivation.explanation.receipt
    result.SeriesDescription = f"camserve {_SERIES_NAMES[kind]} {receipt.method}"[:53] + " (research)"
    _set_dates(result, kind, derivation)
    for element in result.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = derivation.uid(f"{kind}/dimensions")
    result.Manufacturer, result.ManufacturerModelName = "camserve", receipt.model[:64]
    result.DeviceSerialNumber = receipt.model_digest.removeprefix("sha256:")[:64]
    result.SoftwareVersions = derivation.software_versions
    result.ContributingEquipmentSequence = [_contributing_equipment(derivation)]
    return encoded(result, source)


def encoded(result: Dataset, source: Dataset) -> Dataset:
    """Set the character set of a complete result, and return it as it is read back from a file.

    Args:
        result: The result. It is changed.
        source: A dataset whose character set is kept if it can encode all texts of the result.
    """
    _set_character_set(result, str(source.get("SpecificCharacterSet") or ""))
    return _write_and_read(result)


def _set_dates(result: Dataset, kind: str, derivation: Derivation) -> None:
    """Set dates and times to those of the image, and remove optional ones if the image has no date."""
    for name in ("Series", "InstanceCreation", "Content", "PresentationCreation"):
        required = name == "PresentationCreation" or (name == "Content" and kind != "sc")
        moment = derivation.image_datetime or (NO_DATE if required else None)
        if moment is None:
            result.pop(f"{name}Date", None)
            result.pop(f"{name}Time", None)
        elif f"{name}Date" in result or not required:
            setattr(result, f"{name}Date", moment.strftime("%Y%m%d"))
            setattr(result, f"{name}Time", moment.strftime("%H%M%S"))


def _contributing_equipment(derivation: Derivation) -> Dataset:
    """Return the model and the software as Contributing Equipment, with the receipt as a private element."""
    receipt = derivation.explanation.receipt
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "DCM", "Processing Equipment")]
    item.Manufacturer, item.ManufacturerModelName = "camserve", receipt.model[:64]
    item.DeviceSerialNumber = receipt.model_digest.removeprefix("sha256:")[:64]
    item.SoftwareVersions = derivation.software_versions
    maps = " ".join(receipt.map_digests)
    item.ContributionDescription = (
        f"Saliency map by {receipt.method} of model {receipt.model} ({receipt.model_digest}), "
        f"input {receipt.input_digest}, map {maps}, preprocessing {receipt.preprocessing}"
    )[:1024]
    item.private_block(0x0099, "camserve", create=True).add_new(0x01, "UT", derivation.receipt_json)
    return item


def _set_character_set(result: Dataset, declared: str) -> None:
    """Keep the character set of the source if it can encode all texts of the result, and use UTF-8 otherwise."""
    texts = [str(each) for each in _texts(result)]
    if all(text.isascii() for text in texts) and not declared:
        result.pop("SpecificCharacterSet", None)
        return
    codec = "ascii" if declared in _ASCII else python_encoding.get(declared)
    try:
        for text in texts:
            text.encode(codec or "")
    except (UnicodeEncodeError, LookupError):
        declared = "ISO_IR 192"
    result.SpecificCharacterSet = declared


def _texts(dataset: Dataset) -> Iterator[object]:
    """Yield all values whose encoding depends on the character set."""
    for element in dataset.iterall():
        if element.VR in ("LO", "LT", "PN", "SH", "ST", "UC", "UT") and element.value:
            yield from element.value if isinstance(element.value, MultiValue) else [element.value]


def _write_and_read(result: Dataset) -> Dataset:
    """Write the result to memory and read it again."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID(result.SOPClassUID)
    meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = f"CAMSERVE_{__version__}"[:16]
    plain = Dataset()
    plain.update(result)
    plain.file_meta = meta
    plain.preamble = b"\0" * 128
    file = io.BytesIO()
    plain.save_as(file, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(file.getvalue()))
