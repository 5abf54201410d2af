"""The report as Encapsulated PDF (PS3.3 A.45.1): pictures, prediction, scores, method, warnings and safety notes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
from pydicom import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from camserve import heatmaps
from camserve.errors import InvalidArgument
from camserve_dicom.derivation import NO_DATE, Derivation
from camserve_dicom.report_content import meaning, measured_values, notes, parameters
from camserve_dicom.result_header import code, reference
from camserve_dicom.source_header import readable_element

if TYPE_CHECKING:
    from camserve_dicom.pdf_document import PDFDocument

__all__ = ["pdf_report", "require_fonts", "require_packages"]

# Packages of the extra `pdf`, by module. Their versions and the fonts determine the bytes of the PDF.
_PACKAGES = {"fpdf": "fpdf2", "matplotlib": "matplotlib", "uharfbuzz": "uharfbuzz"}
_STUDY = {
    "Study date": "StudyDate",
    "Accession number": "AccessionNumber",
    "Study description": "StudyDescription",
    "Modality": "Modality",
    "Body part": "BodyPartExamined",
    "Series description": "SeriesDescription",
    "Image number": "InstanceNumber",
    "Image UID": "SOPInstanceUID",
}
_SAFETY = (
    "A plausible map does not imply a correct prediction.",
    "The map is interpolated from the model's coarse grid. Its edges are not anatomical edges.",
    "Values are scaled per image and cannot be compared between images or patients.",
    "The overlay alters grey levels. Read the original image.",
)


def require_packages() -> None:
    """Check that the packages that the PDF needs are installed.

    Raises:
        InvalidArgument: If a package is missing.
    """
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise InvalidArgument(
                f"outputs has pdf, which needs the package {package}; install it with: pip install 'camserve[pdf]'",
                field="outputs",
            )


def require_fonts(fonts: Sequence[Path]) -> None:
    """Check that the font files can be used, and that the packages that the PDF needs are installed.

    Args:
        fonts: TrueType or OpenType files.

    Raises:
        InvalidArgument: If a font cannot be read, or a package is missing.
    """
    require_packages()
    from camserve_dicom.pdf_document import PDFDocument

    with PDFDocument("", "", fonts, NO_DATE):
        pass


def pdf_report(derivation: Derivation) -> Dataset:
    """Return an Encapsulated PDF with the pictures, the prediction, scores and texts of the report.

    Raises:
        InvalidArgument: If a package or a font is missing.
    """
    require_packages()
    source = derivation.image.source
    result = Dataset()
    result.SOPClassUID = EncapsulatedPDFStorage
    result.SOPInstanceUID = derivation.uid(f"pdf {_bytes_key(derivation)}")
    result.ContentDate = result.ContentTime = None  # complete() sets them
    result.Modality = "DOC"
    result.ConversionType = "WSD"
    result.BurnedInAnnotation = "YES"  # the pages show the name of the patient
    instance = reference(derivation)
    instance.pop("ReferencedFrameNumber", None)
    result.SourceInstanceSequence = [instance]
    result.DocumentTitle = f"camserve report {derivation.explanation.receipt.method}"[:64]
    result.ConceptNameCodeSequence = [code("126000", "DCM", "Imaging Measurement Report")]
    result.VerificationFlag = "UNVERIFIED"
    moment = derivation.image_datetime
    result.AcquisitionDateTime = moment.strftime("%Y%m%d%H%M%S") if moment and source.get("AcquisitionDate") else None
    data = _pages(derivation, str(result.SOPInstanceUID))
    result.MIMETypeOfEncapsulatedDocument = "application/pdf"
    result.EncapsulatedDocumentLength = len(data)
    result.EncapsulatedDocument = data + b"\0" * (len(data) % 2)
    return result


def _bytes_key(derivation: Derivation) -> str:
    """Return a text that identifies what determines the bytes of the PDF beside the image and the request."""
    fonts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in derivation.pdf_fonts if path.is_file()]
    return json.dumps([*(f"{each} {version(each)}" for each in _PACKAGES.values()), *fonts])


def _pages(derivation: Derivation, uid: str) -> bytes:
    """Return the PDF file."""
    from camserve_dicom.pdf_document import PDFDocument

    patient, created = _identification(derivation.image.source), derivation.image_datetime or NO_DATE
    with PDFDocument(patient, f"UID {uid}", derivation.pdf_fonts, created) as document:
        _write(document, derivation)
        return bytes(document.output())


def _write(document: PDFDocument, derivation: Derivation) -> None:
    """Write all parts of the report."""
    explanation, source = derivation.explanation, derivation.image.source
    warnings, safety_note = notes(derivation)[1:-1], notes(derivation)[-1]  # the intended use is on each page
    document.heading("Explanation of a prediction")
    study = {name: _text(source, keyword) for name, keyword in _STUDY.items()}
    document.rows(study | {"Frame": str(derivation.frame_number or "")})
    document.heading("Prediction")
    values = {
        meaning(name): f"{value:.4g} %" if unit == "%" else f"{value:.4g}"
        for name, value, unit in measured_values(derivation)
    }
    found, code_text = derivation.code, ""
    if found is not None:
        code_text = f"{found.code} of {found.scheme}, {found.meaning}"
    document.rows({"Class": f"{derivation.label} (class {explanation.target.index})", "Code": code_text} | values)
    document.ln(1)
    for text in warnings:
        document.paragraph(f"Warning: {text}", bold=True)
    document.pictures(_pictures(derivation))
    if not derivation.withheld:
        document.colour_scale(PIL.Image.fromarray(heatmaps.COLOURS[None]), "0", "1, of this map's maximum")
    document.heading("Notes")
    document.paragraph("\n".join(f"- {text}" for text in (safety_note, *_SAFETY)))
    document.heading("Method")
    document.rows({"method": explanation.receipt.method} | {k: str(v) for k, v in parameters(derivation).items()})
    document.heading("Receipt")
    document.rows(_receipt(derivation))
    document.note_missing_characters()


def _identification(source: Dataset) -> str:
    """Return name, id, birth date and sex of the patient in one line."""
    # The groups of a name are alphabetic, ideographic and phonetic (PS3.5 6.2.1).
    groups = (" ".join(group.replace("^", " ").split()) for group in _text(source, "PatientName").split("="))
    born, sex = _text(source, "PatientBirthDate"), _text(source, "PatientSex")
    parts = (
        " = ".join(filter(None, groups)) or "no name",
        f"ID {_text(source, 'PatientID') or 'none'}",
        born and f"born {born}",
        sex and f"sex {sex}",
    )
    return "Patient: " + ", ".join(filter(None, parts))


def _text(source: Dataset, keyword: str) -> str:
    """Return a value of the header as text; dates as YYYY-MM-DD; empty if the value is missing or cannot be parsed."""
    element = readable_element(source, keyword)
    text = "" if element is None or element.value is None else str(element.value).strip()
    if element is not None and element.VR == "DA" and len(text) == 8:
        return f"{text[:4]}-{text[4:6]}-{text[6:]}"
    return text


def _pictures(derivation: Derivation) -> dict[str, PIL.Image.Image]:
    """Return the image and, unless it is withheld, the overlay, by caption."""
    image = PIL.Image.fromarray(derivation.image.pixels)
    pictures = {"The image that the model got": image}
    if not derivation.withheld:
        overlay = heatmaps.overlay(image.convert("RGB"), derivation.explanation.saliency, heatmaps.ALPHA)
        pictures["The same image with the map in colour"] = overlay
    return pictures


def _receipt(derivation: Derivation) -> dict[str, str]:
    """Return what is needed to compute the map again, beside the parameters."""
    receipt = derivation.explanation.receipt
    return {
        "input digest": receipt.input_digest,
        "map digest": " ".join(receipt.map_digests),
        "precision": receipt.precision,
        "software": ", ".join(derivation.software_versions),
    }
