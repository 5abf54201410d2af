"""Tables of the gateway's configuration that say what to explain, and what to make of it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydicom import Dataset

from camserve.errors import InvalidArgument
from camserve_dicom.class_codes import ClassCode
from camserve_dicom.derivation import DEFAULT_CHECK, check_metrics
from camserve_dicom.pdf_report import require_packages
from camserve_dicom.source_header import readable_element
from camserve_dicom.study_report import Flag

__all__ = ["COMPARED", "AETitle", "ClassConfig", "FlagConfig", "ImageAttributes", "Rule", "StudyConfig", "Table"]

# VR AE: 1 to 16 characters without backslash, and without a space at either end (PS3.5 6.2).
AETitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]


def _code_strings(value: Any) -> Any:
    """Convert one value or a list of values to a list of upper-case values, as VR CS has them."""
    values = [value] if isinstance(value, str) else value
    return [each.strip().upper() if isinstance(each, str) else each for each in values]


CodeStrings = Annotated[list[str], BeforeValidator(_code_strings), Field(min_length=1)]


Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
_CONDITIONS = ("modality", "body_part", "callers", "view", "laterality", "series_description", "min_size", "max_size")


COMPARED = (
    "Modality",
    "BodyPartExamined",
    "ViewPosition",
    "ViewCodeSequence",
    "ImageLaterality",
    "Laterality",
    "SeriesDescription",
    "Rows",
    "Columns",
)
"""Keywords of the attributes that rules compare."""


@dataclass(frozen=True)
class ImageAttributes:
    """Attributes of an image that rules compare. Texts are in upper case.

    Attributes:
        modality: Modality.
        body_part: Body Part Examined.
        views: View Position, and codes and meanings of View Code Sequence.
        laterality: Image Laterality or Laterality.
        series_description: Series Description.
        rows: Rows; 0 if unknown.
        columns: Columns; 0 if unknown.
    """

    modality: str
    body_part: str
    views: tuple[str, ...]
    laterality: str
    series_description: str
    rows: int
    columns: int

    @classmethod
    def of(cls, header: Dataset) -> ImageAttributes:
        """Return the attributes of a header, which has at least the elements `COMPARED`."""
        codes = header.get("ViewCodeSequence") or []
        return cls(
            modality=_upper(header, "Modality"),
            body_part=_upper(header, "BodyPartExamined"),
            views=(
                _upper(header, "ViewPosition"),
                *(_upper(each, name) for each in codes for name in ("CodeValue", "CodeMeaning")),
            ),
            laterality=_upper(header, "ImageLaterality") or _upper(header, "Laterality"),
            series_description=_upper(header, "SeriesDescription"),
            rows=_length(header, "Rows"),
            columns=_length(header, "Columns"),
        )


def _upper(header: Dataset, name: str) -> str:
    element = readable_element(header, name)
    return "" if element is None or element.value is None else str(element.value).strip().upper()


def _length(header: Dataset, name: str) -> int:
    text = _upper(header, name)
    return int(text) if text.isdecimal() else 0


class Table(BaseModel):
    """A table of the configuration, which has no further keys."""

    model_config = ConfigDict(extra="forbid")


class Rule(Table):
    """A `[[rules]]` table: conditions on an object, and how to explain it. The first matching rule applies."""

    modality: Annotated[CodeStrings | None, Field(description="Condition: one or several values of Modality.")] = None
    body_part: Annotated[CodeStrings | None, Field(description="Condition: values of Body Part Examined.")] = None
    callers: Annotated[list[AETitle] | None, Field(min_length=1, description="Condition: AE titles of senders.")] = None
    view: Annotated[
        CodeStrings | None, Field(description="Condition: View Position, or code or meaning of the view.")
    ] = None
    laterality: Annotated[
        Annotated[list[Literal["R", "L", "B", "U"]], BeforeValidator(_code_strings)] | None,
        Field(description="Condition: Image Laterality or Laterality."),
    ] = None
    series_description: Annotated[
        CodeStrings | None, Field(description="Condition: patterns of Series Description with * and ?.")
    ] = None
    min_size: Annotated[Size | None, Field(description="Condition: least [rows, columns].")] = None
    max_size: Annotated[Size | None, Field(description="Condition: most [rows, columns].")] = None
    ignore: Annotated[bool, Field(description="Do not explain the object.")] = False
    model: Annotated[str | None, Field(description="Name of the model. Default: the server's first model.")] = None
    method: str = "poly-cam"
    parameters: Annotated[dict[str, Any], Field(description="Parameters of the method.")] = {}
    target: Annotated[int | str | None, Field(description="Class index or label. Default: the predicted class.")] = None
    metrics: Annotated[list[str], Field(description="Metrics that score the map.")] = [
        "insertion",
        "deletion",
        "average-gain",
    ]
    outputs: Annotated[list[Literal["sc", "sr", "esr", "pm", "seg", "gsps", "pdf"]], Field(min_length=1)] = ["sc", "sr"]
    check: Annotated[
        str, Field(description="Comparison of two metrics. If it fails, only a report is made. Empty for no check.")
    ] = DEFAULT_CHECK
    frame: Annotated[int, Field(ge=0, description="Frame of a multi-frame image, counted from 0.")] = 0
    window: Annotated[
        tuple[float, float] | None, Field(description="[centre, width] of the grey levels. Default: the header's.")
    ] = None
    regions: Annotated[
        Literal["refuse", "crop", "ignore"], Field(description="What to do with ultrasound regions.")
    ] = "refuse"
    burned_in: Annotated[
        Literal["refuse", "ignore"], Field(description="What to do if the header declares burned-in text.")
    ] = "refuse"
    non_image: Annotated[
        Literal["refuse", "ignore"], Field(description="What to do with segmentations, doses and maps.")
    ] = "refuse"

    @model_validator(mode="after")
    def _require_metrics_of_check(self) -> Self:
        try:
            missing = [name for name in check_metrics(self.check or None) if name not in self.metrics]
        except InvalidArgument as error:
            raise ValueError(f"check: {error.message.removeprefix('check ')}") from error
        if "pdf" in self.outputs:
            try:
                require_packages()
            except InvalidArgument as error:
                raise ValueError(f"outputs: {error.message.removeprefix('outputs has ')}") from error
        if missing:
            raise ValueError(f"check: it needs the metric {missing[0]}; add it to metrics")
        return self

    def matches(self, image: ImageAttributes, caller: str) -> bool:
        """Return True if an image fulfils all conditions of the rule.

        Args:
            image: Attributes of the image.
            caller: AE title of the sender.
        """
        values = (
            (self.modality, {image.modality}),
            (self.body_part, {image.body_part}),
            (self.view, {*image.views}),
            (self.laterality, {image.laterality}),
            (self.callers, {caller}),
        )
        size = (image.rows, image.columns)
        return (
            all(allowed is None or not found.isdisjoint(allowed) for allowed, found in values)
            and (
                self.series_description is None
                # Brackets are ordinary characters of descriptions.
                or any(
                    fnmatchcase(image.series_description, each.replace("[", "[[]")) for each in self.series_description
                )
            )
            and all(least <= length for least, length in zip(self.min_size or (), size, strict=False))
            and all(length <= most for most, length in zip(self.max_size or (), size, strict=False))
        )

    def explain_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `camserve_dicom.explain`."""
        arguments = self.model_dump(exclude={*_CONDITIONS, "ignore"})
        return arguments | {"check": self.check or None}


class StudyConfig(Table):
    """The `[study]` table: the report of a study, which references the results of all its images."""

    report: Annotated[
        Literal["sr", "esr"], Field(description="Class of the report: Comprehensive SR or Enhanced SR.")
    ] = "sr"
    quiet_s: Annotated[
        float, Field(gt=0, description="Seconds without a new image after which a study is complete.")
    ] = 300.0
    expected_images: Annotated[
        int | None,
        Field(ge=1, description="Number of explained images after which a study is complete without waiting."),
    ] = None
    max_images: Annotated[
        int | None, Field(ge=1, description="Maximum number of images of a study that are explained.")
    ] = None

    @model_validator(mode="after")
    def _require_reachable_number(self) -> Self:
        if self.expected_images and self.max_images and self.expected_images > self.max_images:
            raise ValueError(
                f"expected_images: {self.expected_images} is more than max_images, {self.max_images}, so it is never "
                "reached; lower it, or raise max_images"
            )
        return self


class FlagConfig(Table):
    """A `[[flags]]` table: a condition on images that the Key Object Selection of a study names."""

    min_probability: Annotated[float, Field(ge=0, le=1, description="Least probability of the explained class.")]
    target: Annotated[int | str | None, Field(description="Class index or label. Default: any class.")] = None
    model: Annotated[str | None, Field(description="Name of the model. Default: any model.")] = None

    def flag(self) -> Flag:
        """Return the condition."""
        return Flag(self.min_probability, self.target, self.model)


class ClassConfig(Table):
    """A `[[classes]]` table: the code of a class, which reports contain."""

    target: Annotated[int | str, Field(description="Class index or label.")]
    code: Annotated[str, Field(description="Code Value.")]
    scheme: Annotated[str, Field(description="Coding Scheme Designator, such as SCT or RADLEX.")]
    meaning: Annotated[str, Field(description="Code Meaning.")]
    version: Annotated[str, Field(description="Coding Scheme Version.")] = ""
    model: Annotated[str | None, Field(description="Name of the model. Default: all models.")] = None

    @model_validator(mode="after")
    def _require_valid_code(self) -> Self:
        try:
            self.class_code()
        except InvalidArgument as error:
            raise ValueError(f"{error.field}: {error.message}") from error
        return self

    def class_code(self) -> ClassCode:
        """Return the code."""
        return ClassCode(self.target, self.code, self.scheme, self.meaning, self.version, self.model)
