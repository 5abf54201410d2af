"""The scores as Comprehensive SR or Enhanced SR with template TID 1500, Measurement Report (PS3.16)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from highdicom import sr
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.coding import Code

from camserve_dicom.derivation import Derivation
from camserve_dicom.presentation_state import outlines
from camserve_dicom.report_content import meaning, measured_values, notes, parameters
from camserve_dicom.surrogate import restore_references, surrogate_source

__all__ = [
    "SCHEME",
    "MeasurementGroup",
    "device_context",
    "enhanced_report",
    "finding_code",
    "measurement_group",
    "own_code",
    "own_scheme",
    "regions",
    "report_content",
    "structured_report",
]

MeasurementGroup: TypeAlias = sr.PlanarROIMeasurementsAndQualitativeEvaluations

SCHEME = "99CAMSERVE"
"""Coding scheme of concepts that have no standard code."""

# Further areas are left out; they are small.
MAX_REGIONS = 20
# A closed line of fewer points has no area.
MIN_POINTS = 3

_COMMENT = Code("121106", "DCM", "Comment")
_QUALITATIVE = Code("C0034375", "UMLS", "Qualitative Evaluations")
_IMAGING = Code("363679005", "SCT", "Imaging procedure")
_UNITS = {"1": Code("1", "UCUM", "no units"), "%": Code("%", "UCUM", "Percent")}


def structured_report(derivation: Derivation) -> Dataset:
    """Return a Comprehensive SR with probability and scores as measurements, and warnings as text."""
    return _report(derivation, "sr", sr.ComprehensiveSR)


def enhanced_report(derivation: Derivation) -> Dataset:
    """Return the same report as Enhanced SR, which more archives and viewers accept."""
    return _report(derivation, "esr", sr.EnhancedSR)


def _report(derivation: Derivation, kind: str, document: type[sr.ComprehensiveSR | sr.EnhancedSR]) -> Dataset:
    source = surrogate_source(derivation)
    groups = [_group(derivation, source, number, line) for number, line in enumerate(regions(derivation))]
    result = document(
        evidence=[source],
        content=report_content(
            derivation.uid("observer"), derivation.explanation.receipt.model, groups, [source], notes(derivation)
        ),
        series_instance_uid=derivation.uid(f"{kind}/series"),
        series_number=1,
        sop_instance_uid=derivation.uid(kind),
        instance_number=1,
        manufacturer="camserve",
        is_complete=True,
    )
    result.CodingSchemeIdentificationSequence = [own_scheme()]
    return restore_references(result, derivation, frames=False)  # the regions reference the frame


def report_content(
    observer: str, model: str, groups: Sequence[MeasurementGroup], sources: Sequence[Dataset], texts: Sequence[str]
) -> sr.MeasurementReport:
    """Return the content of a Measurement Report.

    Args:
        observer: UID of the device that observes.
        model: Model name of this device.
        groups: Measurement groups.
        sources: Images of the Image Library.
        texts: Comments.
    """
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=observer, name="camserve", manufacturer_name="camserve", model_name=model
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device_context(device)),
        procedure_reported=_IMAGING,
        imaging_measurements=groups,
    )
    items = content[0].ContentSequence
    measured = next(i for i, each in enumerate(items) if each.ConceptNameCodeSequence[0].CodeValue == "126010")
    items.insert(measured, _image_library(sources))
    items.append(_comments(texts))
    return content


def device_context(device: sr.DeviceObserverIdentifyingAttributes) -> sr.ObserverContext:
    """Return the context of a device that observes."""
    return sr.ObserverContext(sr.CodedConcept("121007", "DCM", "Device"), device)


def own_scheme() -> Dataset:
    """Return an item of Coding Scheme Identification Sequence for camserve's own scheme."""
    scheme = Dataset()
    scheme.CodingSchemeDesignator = SCHEME
    scheme.CodingSchemeName, scheme.CodingSchemeResponsibleOrganization = "camserve", "camserve"
    return scheme


def _image_library(sources: Sequence[Dataset]) -> sr.ContainerContentItem:
    """Return an Image Library (TID 1600) with the sources. highdicom's needs attributes that not every header has."""
    contains = sr.RelationshipTypeValues.CONTAINS
    images = [
        sr.ImageContentItem(
            Code("260753009", "SCT", "Source"), each.SOPClassUID, each.SOPInstanceUID, relationship_type=contains
        )
        for each in sources
    ]
    group = sr.ContainerContentItem(Code("126200", "DCM", "Image Library Group"), relationship_type=contains)
    group.ContentSequence = sr.ContentSequence(images)
    library = sr.ContainerContentItem(Code("111028", "DCM", "Image Library"), relationship_type=contains)
    library.ContentSequence = sr.ContentSequence([group])
    return library


def regions(derivation: Derivation) -> list[NDArray[np.float32]]:
    """Return the outlines of the map's highest values, largest first.

    If there is none, or if the overlay is withheld, the outline of the image replaces them: viewers expect a region.
    """
    lines = [] if derivation.withheld else outlines(derivation)
    largest = sorted((each for each in lines if len(each) > MIN_POINTS), key=_area, reverse=True)[:MAX_REGIONS]
    if largest:
        return largest
    left, top, right, bottom = derivation.image.box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return [np.array(corners, np.float32)]


def _area(line: NDArray[np.float32]) -> float:
    """Return the area inside a closed line [points, 2] (shoelace formula)."""
    x, y = line.astype(np.float64).T
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)


def _group(derivation: Derivation, source: Dataset, number: int, line: NDArray[np.float32]) -> MeasurementGroup:
    """Return the measurement group of a region. Only the first one has all measurements."""
    receipt = derivation.explanation.receipt
    return measurement_group(
        sr.TrackingIdentifier(derivation.uid(f"tracking/{number}" if number else "tracking"), derivation.tracking_id),
        source,
        derivation.frame_number,
        line,
        finding_code(derivation),
        sr.AlgorithmIdentification(
            name=receipt.method,
            version=receipt.versions.get("camserve") or "unknown",
            parameters=[f"{name} = {value}" for name, value in parameters(derivation).items()],
        ),
        measured_values(derivation)[: 1 if number else None],
    )


def measurement_group(
    tracking: sr.TrackingIdentifier,
    source: Dataset,
    frame_number: int | None,
    line: NDArray[np.float32],
    finding: Code,
    algorithm: sr.AlgorithmIdentification,
    values: Iterable[tuple[str, float, str]],
) -> MeasurementGroup:
    """Return the measurement group of a region (TID 1410).

    Args:
        tracking: Identification of the group.
        source: The image of the region.
        frame_number: Number of its frame, counted from 1; None for a single-frame image.
        line: The region, a closed line [points, 2] with (column, row).
        finding: The class.
        algorithm: The method.
        values: (name, value, unit) of each measurement.
    """
    image = sr.SourceImageForRegion(
        source.SOPClassUID, source.SOPInstanceUID, referenced_frame_numbers=[frame_number] if frame_number else None
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=tracking,
        referenced_region=sr.ImageRegion(sr.GraphicTypeValues.POLYLINE, line, image),
        finding_type=finding,
        algorithm_id=algorithm,
        measurements=[
            sr.Measurement(own_code(name, meaning(name)), value, _UNITS.get(unit, _UNITS["1"]))
            for name, value, unit in values
        ],
    )


def finding_code(derivation: Derivation) -> Code:
    """Return the code of the class: that of the site, or one of camserve's scheme."""
    if (given := derivation.code) is not None:
        return Code(given.code, given.scheme, given.meaning, given.version or None)
    # The meaning of a class index depends on the model, so the code's version is the model's digest.
    version = derivation.explanation.receipt.model_digest.removeprefix("sha256:")[:16]
    return Code(f"class-{derivation.explanation.target.index}", SCHEME, derivation.label[:64], version)


def _comments(texts: Sequence[str]) -> sr.ContainerContentItem:
    """Return warnings and safety notes as text items."""
    item = sr.ContainerContentItem(_QUALITATIVE, relationship_type=sr.RelationshipTypeValues.CONTAINS)
    item.ContentSequence = sr.ContentSequence(
        [sr.TextContentItem(_COMMENT, text, relationship_type=sr.RelationshipTypeValues.CONTAINS) for text in texts]
    )
    return item


def own_code(value: str, meaning: str) -> Code:
    """Return a code of camserve's own scheme. highdicom writes values of more than 16 characters as Long Code Value."""
    return Code(value, SCHEME, meaning[:64])
