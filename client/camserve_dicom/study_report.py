"""Objects of a whole study: a report that references all results, and a selection of flagged images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from highdicom import ko, sr
from pydicom import Dataset
from pydicom.sr.coding import Code

from camserve_dicom.contrast import is_constant
from camserve_dicom.copied_attributes import copy_patient_and_study
from camserve_dicom.derivation import NO_DATE, Derivation, derived_uid, library_versions
from camserve_dicom.overlay import WARNING
from camserve_dicom.report_content import measured_values, parameters
from camserve_dicom.result_header import code, encoded
from camserve_dicom.structured_report import (
    device_context,
    finding_code,
    measurement_group,
    own_code,
    own_scheme,
    regions,
    report_content,
)

__all__ = ["ExplainedImage", "Flag", "Reference", "patient_and_study", "study_objects"]

_DOCUMENTS = {"sr": sr.ComprehensiveSR, "esr": sr.EnhancedSR}
# Results that are images; content items reference the others as composite objects.
_IMAGES = ("sc", "pm", "seg")
_KIND_NAMES = {
    "sc": "Overlay",
    "sr": "Report of the image",
    "esr": "Report of the image",
    "pm": "Map",
    "seg": "Segmentation",
    "gsps": "Presentation state",
    "pdf": "PDF report of the image",
}
_SERIES = {"study": (9008, "study report"), "flagged": (9009, "flagged images")}
_MOMENT = "%Y%m%d%H%M%S"


@dataclass(frozen=True)
class Reference:
    """A reference to an object.

    Attributes:
        kind: Kind of the result, see `camserve_dicom.KINDS`; empty for an image.
        sop_class: SOP Class UID.
        sop_instance: SOP Instance UID.
        series: Series Instance UID.
    """

    kind: str
    sop_class: str
    sop_instance: str
    series: str

    @classmethod
    def to(cls, dataset: Dataset, kind: str = "") -> Reference:
        """Return a reference to a dataset."""
        return cls(kind, str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(dataset.SeriesInstanceUID))


@dataclass(frozen=True)
class ExplainedImage:
    """Record of an explained image, from which the report of its study is made.

    Attributes:
        source: The image.
        frame_number: Number of the explained frame, counted from 1; None for a single-frame image.
        results: The results.
        index: Class index.
        label: Class label.
        finding: (Code Value, Coding Scheme Designator, Code Meaning, Coding Scheme Version) of the class.
        values: (name, value, unit) of probability and scores.
        region: The largest outline, a closed line of (column, row).
        model: Name of the model.
        model_digest: Digest of the model.
        method: Name of the method.
        version: Version of the server.
        parameters: Parameters of the explanation, as texts.
        software: Values of Software Versions.
        tracking: (UID, text) that identifies the finding also in other results.
        withheld: The reason why the overlay is withheld, or empty.
        warnings: Warnings.
        constant: True if all pixels that the model got have the same value, so that the prediction means nothing.
        moment: Date and time of the image as YYYYMMDDHHMMSS; empty if unknown.
    """

    source: Reference
    frame_number: int | None
    results: Sequence[Reference]
    index: int
    label: str
    finding: tuple[str, str, str, str | None]
    values: Sequence[tuple[str, float, str]]
    region: Sequence[tuple[float, float]]
    model: str
    model_digest: str
    method: str
    version: str
    parameters: Sequence[str]
    software: Sequence[str]
    tracking: tuple[str, str]
    withheld: str
    warnings: Sequence[str]
    constant: bool
    moment: str

    @classmethod
    def of(cls, derivation: Derivation, objects: dict[str, Dataset]) -> ExplainedImage:
        """Return the data of an explanation and its results."""
        receipt, target = derivation.explanation.receipt, derivation.explanation.target
        finding = finding_code(derivation)
        moment = derivation.image_datetime
        return cls(
            source=Reference.to(derivation.image.source),
            frame_number=derivation.frame_number,
            results=[Reference.to(each, kind) for kind, each in objects.items()],
            index=target.index,
            label=target.label,
            finding=(finding.value, finding.scheme_designator, finding.meaning, finding.scheme_version),
            values=measured_values(derivation),
            region=[(float(x), float(y)) for x, y in regions(derivation)[0]],
            model=receipt.model,
            model_digest=receipt.model_digest,
            method=receipt.method,
            version=receipt.versions.get("camserve") or "unknown",
            parameters=[f"{name} = {value}" for name, value in parameters(derivation).items()],
            software=derivation.software_versions,
            tracking=(str(derivation.uid("tracking")), derivation.tracking_id),
            withheld=derivation.withheld,
            warnings=derivation.warnings,
            constant=is_constant(derivation.image.pixels),
            moment=moment.strftime(_MOMENT) if moment else "",
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ExplainedImage:
        """Return the data that `to_json` converted."""
        source, results = Reference(**data["source"]), [Reference(**each) for each in data["results"]]
        return cls(**data | {"source": source, "results": results})

    def to_json(self) -> dict[str, Any]:
        """Return the data as values of JSON."""
        return asdict(self)

    @property
    def probability(self) -> float:
        """Probability of the class."""
        return next(value for name, value, _ in self.values if name == "probability")


@dataclass(frozen=True)
class Flag:
    """A condition on images that a Key Object Selection names.

    Attributes:
        min_probability: Least probability, in [0, 1].
        target: Label or index of the class; None for any class.
        model: Name of the model; None for any model.
    """

    min_probability: float
    target: str | int | None = None
    model: str | None = None

    def matches(self, image: ExplainedImage) -> bool:
        """Return True if an image fulfils the condition. A constant image never does."""
        return (
            not image.constant
            and self.target in (None, image.index, image.label or None)
            and self.model in (None, image.model)
            and image.probability >= self.min_probability
        )

    def __str__(self) -> str:
        what = "any class" if self.target is None else f"class {self.target}"
        return f"{what}{f' of model {self.model}' if self.model else ''}, probability at least {self.min_probability:g}"


def patient_and_study(source: Dataset) -> Dataset:
    """Return the attributes of patient and study that results copy from an image, as a dataset of their own."""
    header = Dataset()
    copy_patient_and_study(source, header)
    return encoded(_identified(header, Reference.to(source)), source)


def _identified(dataset: Dataset, reference: Reference) -> Dataset:
    dataset.SOPClassUID, dataset.SOPInstanceUID = reference.sop_class, reference.sop_instance
    dataset.SeriesInstanceUID = reference.series
    return dataset


def study_objects(
    header: Dataset,
    images: Sequence[ExplainedImage],
    *,
    report: Literal["sr", "esr"] = "sr",
    flags: Sequence[Flag] = (),
    predecessor: Reference | None = None,
    texts: Sequence[str] = (),
) -> dict[str, Dataset]:
    """Make the objects of a study. The same arguments give the same bytes.

    Args:
        header: Attributes of patient and study, see `patient_and_study`.
        images: The explained images; at least one.
        report: Class of the report: "sr" for Comprehensive SR, "esr" for Enhanced SR.
        flags: Conditions on flagged images. An image is flagged if it fulfils one of them.
        predecessor: The earlier report of the study that this one replaces.
        texts: Further comments for the report.

    Returns:
        "study": a Measurement Report (TID 1500) with the finding of each image and references to all results;
        "flagged": a Key Object Selection (TID 2010) of the flagged images, if there is one.
    """
    images = sorted(images, key=lambda each: each.source.sop_instance)
    made = {"study": _report(header, images, report, predecessor, texts)}
    if flagged := [each for each in images if any(flag.matches(each) for flag in flags)]:
        made["flagged"] = _selection(header, flagged, flags)
    return made


def _report(
    header: Dataset,
    images: Sequence[ExplainedImage],
    kind: str,
    predecessor: Reference | None,
    texts: Sequence[str],
) -> Dataset:
    key = _key(header, images, report=kind, predecessor=predecessor and predecessor.sop_instance, texts=[*texts])
    sources = [_stub(header, each.source) for each in images]
    groups = [_group(each, source) for each, source in zip(images, sources, strict=True)]
    content = report_content(
        derived_uid(f"{key}\nobserver"),
        _common([each.model for each in images]),
        groups,
        sources,
        _texts(images, texts),
    )
    content[0].ContentSequence.append(_result_references(images))
    result = _DOCUMENTS[kind](
        evidence=[*sources, *(_stub(header, each) for image in images for each in image.results)],
        content=content,
        previous_versions=[_stub(header, predecessor)] if predecessor else None,
        manufacturer="camserve",
        is_complete=True,
        **_identity(key, "study"),
    )
    result.CodingSchemeIdentificationSequence = [own_scheme()]
    return _complete(result, header, images, "study")


def _selection(header: Dataset, images: Sequence[ExplainedImage], flags: Sequence[Flag]) -> Dataset:
    key = _key(header, images, flags=[str(each) for each in flags])
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid(f"{key}\nobserver"), name="camserve", manufacturer_name="camserve"
    )
    sources = [_stub(header, each.source) for each in images]
    for source in sources:
        source.Rows = source.Columns = 0  # highdicom recognises images by them
    content = ko.KeyObjectSelection(
        Code("113000", "DCM", "Of Interest"),
        sources,
        observer_device_context=device_context(device),
        description=f"{WARNING}. Images for which a model gives: {'; or '.join(map(str, flags))}.",
    )
    result = ko.KeyObjectSelectionDocument(
        evidence=sources, content=content, manufacturer="camserve", **_identity(key, "flagged")
    )
    frames = {each.source.sop_instance: each.frame_number for each in images if each.frame_number}
    for item in result.ContentSequence:
        for referenced in item.get("ReferencedSOPSequence", []):
            if frame := frames.get(str(referenced.ReferencedSOPInstanceUID)):
                referenced.ReferencedFrameNumber = frame
    return _complete(result, header, images, "flagged")


def _key(header: Dataset, images: Sequence[ExplainedImage], **settings: Any) -> str:
    """Return a JSON text that identifies the content of an object. Its UID is derived from it."""
    return json.dumps(
        {
            "study": str(header.StudyInstanceUID),
            "results": sorted(each.sop_instance for image in images for each in image.results),
            "findings": [each.finding for each in images],
            "versions": library_versions(),
            **settings,
        },
        sort_keys=True,
    )


def _identity(key: str, kind: str) -> dict[str, Any]:
    """Return the UIDs and numbers of an object, as arguments of highdicom."""
    return {
        "series_instance_uid": derived_uid(f"{key}\n{kind}/series"),
        "series_number": _SERIES[kind][0],
        "sop_instance_uid": derived_uid(f"{key}\n{kind}"),
        "instance_number": 1,
    }


def _stub(header: Dataset, reference: Reference) -> Dataset:
    """Return a dataset with the attributes of an object that highdicom needs to reference it."""
    stub = _identified(Dataset(), reference)
    stub.StudyInstanceUID = header.StudyInstanceUID
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                 "AccessionNumber", "ReferringPhysicianName"):  # fmt: skip
        setattr(stub, name, None)  # `_complete` copies them from the header
    return stub


def _group(image: ExplainedImage, source: Dataset) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    uid, text = image.tracking
    value, scheme, meaning, version = image.finding
    return measurement_group(
        sr.TrackingIdentifier(uid, text),
        source,
        image.frame_number,
        np.array(image.region, np.float32),
        Code(value, scheme, meaning, version),
        sr.AlgorithmIdentification(name=image.method, version=image.version, parameters=[*image.parameters]),
        [(name, value, unit) for name, value, unit in image.values],
    )


def _result_references(images: Sequence[ExplainedImage]) -> sr.ContainerContentItem:
    """Return a container with references to all results, in the order of the images."""
    contains = sr.RelationshipTypeValues.CONTAINS
    container = sr.ContainerContentItem(own_code("results", "Results of all images"), relationship_type=contains)
    items: list[sr.ContentItem] = []
    for each in (result for image in images for result in image.results):
        item = sr.ImageContentItem if each.kind in _IMAGES else sr.CompositeContentItem
        name = own_code(f"result-{each.kind}", _KIND_NAMES[each.kind])
        items.append(item(name, each.sop_class, each.sop_instance, relationship_type=contains))
    container.ContentSequence = sr.ContentSequence(items)
    return container


def _texts(images: Sequence[ExplainedImage], texts: Sequence[str]) -> list[str]:
    """Return the comments of the report."""
    numbered = list(enumerate(images, 1))
    return [
        WARNING,
        *texts,
        *(f"Image {number}: the overlay is withheld. {each.withheld}" for number, each in numbered if each.withheld),
        *(f"Image {number}: {warning}" for number, each in numbered for warning in each.warnings),
        "A map shows what influenced the model, not where disease is.",
    ]


def _common(values: Sequence[str]) -> str:
    """Return the value that all images share, or "several"."""
    return values[0] if len({*values}) == 1 else "several"


def _complete(result: Dataset, header: Dataset, images: Sequence[ExplainedImage], kind: str) -> Dataset:
    """Add patient, study, dates and equipment."""
    copy_patient_and_study(header, result)
    result.SeriesDescription = f"camserve {_SERIES[kind][1]} (research)"
    moment = max((each.moment for each in images), default="")
    for name in ("Series", "InstanceCreation", "Content"):
        if moment or name == "Content":
            when = datetime.strptime(moment, _MOMENT) if moment else NO_DATE
            setattr(result, f"{name}Date", when.strftime("%Y%m%d"))
            setattr(result, f"{name}Time", when.strftime("%H%M%S"))
        else:
            result.pop(f"{name}Date", None)
            result.pop(f"{name}Time", None)
    digests = [each.model_digest.removeprefix("sha256:") for each in images]
    result.Manufacturer, result.ManufacturerModelName = "camserve", _common([each.model for each in images])[:64]
    result.DeviceSerialNumber = _common(digests)[:64]
    result.SoftwareVersions = sorted({each for image in images for each in image.software})
    result.ContributingEquipmentSequence = [
        _equipment(model, digest) for model, digest in sorted({(each.model, each.model_digest) for each in images})
    ]
    return encoded(result, header)


def _equipment(model: str, digest: str) -> Dataset:
    """Return a model as Contributing Equipment."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "DCM", "Processing Equipment")]
    item.Manufacturer, item.ManufacturerModelName = "camserve", model[:64]
    item.DeviceSerialNumber = digest.removeprefix("sha256:")[:64]
    item.ContributionDescription = f"Saliency maps of model {model} ({digest})"[:1024]
    return item
