"""From a DICOM image to the objects that explain it."""

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
from camserve_dicom.derivation import DEFAULT_CHECK, Derivation, check_metrics
from camserve_dicom.reading import RenderedImage, Source, Window, read
from camserve_dicom.results import DEFAULT_OUTPUTS, objects, outputs_of

if TYPE_CHECKING:
    from camserve import aio
    from camserve.client import Client

__all__ = ["DEFAULT_METRICS", "DicomExplanation", "explain", "explain_async", "request_pixels"]

DEFAULT_METRICS = ("insertion", "deletion", "average-gain")
# A request holds 64 MiB; no model looks at a fraction of it.
_MOST_PIXELS = 20_000_000


@dataclass(frozen=True, eq=False)
class DicomExplanation:
    """An explanation of `image`, and its `objects` by kind: "sc", "sr", "pm", "seg", "gsps".

    `withheld` says which check failed, so that there is only a report; it is empty otherwise.
    """

    explanation: Explanation
    image: RenderedImage
    objects: dict[str, Dataset] = field(repr=False)
    withheld: str

    def save(self, folder: str | PathLike[str], stem: str | None = None) -> list[Path]:
        """Writes STEM.KIND.dcm for each object, making the folder if need be; returns them.

        The stem is the SOP Instance UID of each unless it is given. Files of the same names are replaced.
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
class Asked:
    """A image, what to ask the server for about it, and what to make of the answer."""

    image: RenderedImage
    request: dict[str, Any]
    outputs: tuple[str, ...]
    check: str | None

    def answered(self, explanation: Explanation) -> DicomExplanation:
        """The objects of the answer."""
        metrics = self.request["metrics"]
        made = objects(
            explanation,
            self.image,
            self.outputs,
            check=self.check,
            metrics=metrics if any(metrics.values()) else None,
        )
        return DicomExplanation(explanation, self.image, made, Derivation(explanation, self.image, self.check).withheld)


def asked(
    source: Source,
    *,
    frame: int = 0,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = DEFAULT_METRICS,
    check: str | None = DEFAULT_CHECK,
    window: Window | None = None,
    regions: Literal["refuse", "crop", "ignore"] = "refuse",
    burned_in: Literal["refuse", "ignore"] = "refuse",
    **request: Any,
) -> Asked:
    """Reads the source; what is given is as for `explain`. Nothing is sent."""
    names = [metrics] if isinstance(metrics, str) else metrics
    scored: Mapping[str, Parameters] = metrics if isinstance(metrics, Mapping) else {name: {} for name in names}
    kinds = outputs_of(outputs)
    if lacking := [name for name in check_metrics(check) if name not in scored]:
        raise InvalidArgument(f"the check needs the metric {lacking[0]}: ask for it, too", field="check")
    image = read(source, frame=frame, window=window, regions=regions, burned_in=burned_in)
    return Asked(
        image,
        {"image": request_pixels(image), "metrics": scored, "request_id": uuid.uuid4().hex, **request},
        kinds,
        check,
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
    **more: Any,
) -> DicomExplanation:
    """Explain a DICOM image, and make DICOM objects of the answer.

    Only the pixels and a request id made by chance are sent; the header stays here.

    source: a path, a binary file, or a pydicom dataset, which is not changed.
    frame: of several, from 0.
    outputs: kinds of objects: "sc", the overlay as Secondary Capture; "sr", a report with the scores; "pm", the map
        itself as Parametric Map; "seg", where it is above half of its maximum; "gsps", the outline of that as
        presentation state.
    metrics: that score the map; all are in the report.
    check: two metrics, or one and a number, such as "insertion>deletion": where it does not hold, there is but a report
        that says so. None checks nothing.
    window, regions, burned_in: as for `read`.

    `model`, `method`, `target`, `parameters` and what else may be given are as for `Client.explain`.

    Raises OSError for a file that cannot be read, DicomError for what is no such image or is refused, and what
    `Client.explain` raises.
    """
    ready = asked(
        source,
        frame=frame,
        outputs=outputs,
        metrics=metrics,
        check=check,
        window=window,
        regions=regions,
        burned_in=burned_in,
        model=model,
        method=method,
        target=target,
        parameters=parameters,
        **more,
    )
    return ready.answered(client.explain(**ready.request))


async def explain_async(client: aio.Client, source: Source, **given: Any) -> DicomExplanation:
    """As `explain`, by the awaited client; pixels and objects are made on a thread beside the event loop."""
    ready = await asyncio.to_thread(functools.partial(asked, source, **given))
    explanation = await client.explain(**ready.request)
    return await asyncio.to_thread(ready.answered, explanation)


def request_pixels(image: RenderedImage) -> NDArray[np.uint8]:
    """What is sent of a image: its pixels, of very large ones the means of squares of them."""
    pixels = image.pixels
    factor = int(np.ceil((pixels.shape[0] * pixels.shape[1] / _MOST_PIXELS) ** 0.5))
    return pixels if factor <= 1 else np.asarray(PIL.Image.fromarray(pixels).reduce(factor), dtype=np.uint8)
