"""Explanation of a DICOM image by a server, with DICOM objects as the result."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydicom import Dataset

from camserve.answers import Explanation
from camserve.errors import InvalidArgument
from camserve.request_messages import Parameters, TargetLike
from camserve_dicom.class_codes import ClassCode
from camserve_dicom.derivation import DEFAULT_CHECK, Derivation, check_metrics
from camserve_dicom.pdf_report import require_fonts
from camserve_dicom.reading import RenderedImage, Source, Window, read
from camserve_dicom.results import DEFAULT_OUTPUTS, derived_objects, parse_outputs

if TYPE_CHECKING:
    from camserve import aio
    from camserve.client import Client

__all__ = [
    "DEFAULT_METRICS",
    "MAX_PIXELS",
    "DicomExplanation",
    "PreparedRequest",
    "explain",
    "explain_async",
    "request_pixels",
]

DEFAULT_METRICS = ("insertion", "deletion", "average-gain")
MAX_PIXELS = 20_000_000
"""Maximum number of pixels of a request. A message holds 64 MiB, and models resize their input to far fewer pixels."""


@dataclass(frozen=True, eq=False)
class DicomExplanation:
    """An explanation of a DICOM image and its result objects.

    Attributes:
        explanation: The server's response: map, scores, target and receipt.
        image: The rendered image that was explained.
        objects: Result objects by kind, see `camserve_dicom.KINDS`.
        withheld: The reason why only a report was made: a constant image, or a failed check. Otherwise empty.
        warnings: Warnings about the image, such as saturated pixels, and those of the server.
        derivation: What the objects were made from, for the gateway.
    """

    explanation: Explanation
    image: RenderedImage
    objects: dict[str, Dataset] = field(repr=False)
    withheld: str
    warnings: tuple[str, ...] = ()
    derivation: Derivation | None = field(default=None, repr=False)

    def save(self, folder: str | PathLike[str], stem: str | None = None) -> list[Path]:
        """Write each object to the file STEM.KIND.dcm. Existing files are replaced.

        Args:
            folder: The folder of the files, which is created if necessary.
            stem: First part of the file names. The default is the SOP Instance UID of each object.

        Returns:
            The paths of the files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for kind, each in self.objects.items():
            path = folder / f"{stem or each.SOPInstanceUID}.{kind}.dcm"
            each.save_as(path, enforce_file_format=True)
            written.append(path)
        return written


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A rendered image with the arguments of `Client.explain` and of `objects`.

    Attributes:
        image: The rendered image.
        request: Keyword arguments of `Client.explain`.
        outputs: Kinds of objects to make.
        check: The faithfulness check, or None.
        pdf_fonts: Further font files of the PDF report.
        class_codes: Codes of classes.
    """

    image: RenderedImage
    request: dict[str, Any]
    outputs: tuple[str, ...]
    check: str | None
    pdf_fonts: tuple[Path, ...] = ()
    class_codes: tuple[ClassCode, ...] = ()

    def with_objects(self, explanation: Explanation) -> DicomExplanation:
        """Return the explanation with its result objects."""
        metrics = self.request["metrics"]
        derivation = Derivation(
            explanation,
            self.image,
            self.check,
            metrics if any(metrics.values()) else None,
            self.pdf_fonts,
            self.class_codes,
        )
        made = derived_objects(derivation, self.outputs)
        return DicomExplanation(explanation, self.image, made, derivation.withheld, derivation.warnings, derivation)


def prepare(
    source: Source,
    *,
    frame: int = 0,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = DEFAULT_METRICS,
    check: str | None = DEFAULT_CHECK,
    window: Window | None = None,
    regions: Literal["refuse", "crop", "ignore"] = "refuse",
    burned_in: Literal["refuse", "ignore"] = "refuse",
    non_image: Literal["refuse", "ignore"] = "refuse",
    pdf_fonts: Sequence[str | PathLike[str]] = (),
    class_codes: Sequence[ClassCode] = (),
    **request: Any,
) -> PreparedRequest:
    """Render the source and check the arguments of `explain`. Nothing is sent to a server."""
    names = [metrics] if isinstance(metrics, str) else metrics
    scored: Mapping[str, Parameters] = metrics if isinstance(metrics, Mapping) else {name: {} for name in names}
    kinds, fonts = parse_outputs(outputs), tuple(map(Path, pdf_fonts))
    if "pdf" in kinds and fonts:
        require_fonts(fonts)
    if missing := [name for name in check_metrics(check) if name not in scored]:
        raise InvalidArgument(f"the check needs the metric {missing[0]}; add it to metrics", field="check")
    image = read(source, frame=frame, window=window, regions=regions, burned_in=burned_in, non_image=non_image)
    return PreparedRequest(
        image,
        {"image": request_pixels(image), "metrics": scored, "request_id": uuid.uuid4().hex, **request},
        kinds,
        check,
        fonts,
        tuple(class_codes),
    )


def explain(
    client: Client,
    source: Source,
    *,
    frame: int = 0,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    model: str | None = None,
    method: str = "poly-cam",
    target: TargetLike | None = None,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = DEFAULT_METRICS,
    parameters: Parameters | None = None,
    check: str | None = DEFAULT_CHECK,
    window: Window | None = None,
    regions: Literal["refuse", "crop", "ignore"] = "refuse",
    burned_in: Literal["refuse", "ignore"] = "refuse",
    non_image: Literal["refuse", "ignore"] = "refuse",
    pdf_fonts: Sequence[str | PathLike[str]] = (),
    class_codes: Sequence[ClassCode] = (),
    **options: Any,
) -> DicomExplanation:
    """Explain a DICOM image, and make DICOM objects of the explanation.

    The function sends the pixels, a random request id and the arguments of the explanation. The header is not sent.

    Args:
        client: A client of the camserve server.
        source: A path, a binary file, or a pydicom dataset, which is not changed.
        frame: Number of the frame, counted from 0.
        outputs: Kinds of objects: "sc", the overlay as Secondary Capture; "sr", a report with the scores and the
            outline of pixels with at least half of the map's maximum; "esr", the same as Enhanced SR; "pm", the map as
            Parametric Map; "seg", these pixels as Segmentation; "gsps", their outline as presentation state; "pdf", a
            report with pictures as Encapsulated PDF.
        model: Name of the model, as for `Client.explain`.
        method: Name of the method, as for `Client.explain`.
        target: The class to explain, as for `Client.explain`. The default is the predicted class.
        metrics: Metrics that score the map, with parameters if it is a mapping. All scores are in the report.
        parameters: Parameters of the method, as for `Client.explain`.
        check: A comparison of two metrics, or of a metric and a number, such as "insertion>deletion". If it fails, or
            if the image is constant, only a report is made, which gives the reason. None disables the check.
        window: (centre, width) of the grey levels, as for `read`.
        regions: What to do with an image that has ultrasound regions, as for `read`.
        burned_in: What to do with an image that has burned-in text, as for `read`.
        non_image: What to do with an object whose values are not an image, as for `read`.
        pdf_fonts: TrueType or OpenType files for characters of the PDF that DejaVu Sans lacks, such as Chinese ones.
        class_codes: Codes of classes, such as those of SNOMED CT, which the reports contain instead of camserve's.
        **options: Further arguments of `Client.explain`.

    Returns:
        The explanation with its objects.

    Raises:
        DicomError: If the source is not a supported image or is refused, or if an object cannot be made.
        OSError: If the file cannot be read.
        CamserveError: If an argument is invalid or the server fails, as for `Client.explain`.
    """
    prepared = prepare(
        source,
        frame=frame,
        outputs=outputs,
        metrics=metrics,
        check=check,
        window=window,
        regions=regions,
        burned_in=burned_in,
        non_image=non_image,
        pdf_fonts=pdf_fonts,
        class_codes=class_codes,
        model=model,
        method=method,
        target=target,
        parameters=parameters,
        **options,
    )
    return prepared.with_objects(client.explain(**prepared.request))


async def explain_async(client: aio.Client, source: Source, **options: Any) -> DicomExplanation:
    """Explain a DICOM image with the asyncio client. A thread renders the image and makes the objects.

    Args:
        client: An asyncio client of the camserve server.
        source: A path, a binary file, or a pydicom dataset, which is not changed.
        **options: Keyword arguments of `explain`.

    Returns:
        The explanation with its objects.

    Raises:
        DicomError: As for `explain`.
        OSError: As for `explain`.
        CamserveError: As for `explain`.
    """
    prepared = await asyncio.to_thread(functools.partial(prepare, source, **options))
    explanation = await client.explain(**prepared.request)
    return await asyncio.to_thread(prepared.with_objects, explanation)


def request_pixels(image: RenderedImage) -> NDArray[np.uint8]:
    """Return the pixels that `explain` sends to the server.

    Args:
        image: A rendered image.

    Returns:
        The pixels of the image, uint8 [H, W] or [H, W, 3]. An image of more than 20 million pixels is reduced to the
        means of square blocks.
    """
    pixels = image.pixels
    factor = int(np.ceil((pixels.shape[0] * pixels.shape[1] / MAX_PIXELS) ** 0.5))
    return pixels if factor <= 1 else np.asarray(PIL.Image.fromarray(pixels).reduce(factor), dtype=np.uint8)
