"""The `[worklist]` table of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from camserve_dicom.gateway.config_types import Url
from camserve_dicom.gateway.rules import Table

__all__ = ["WorklistConfig"]

Filter = Annotated[str, Field(min_length=1, max_length=64)]


class WorklistConfig(Table):
    """The `[worklist]` table: a UPS-RS worklist whose workitems the gateway performs."""

    url: Annotated[Url, Field(description="URL of DICOMweb, without /workitems.")]
    retrieve_url: Annotated[
        Url | None, Field(description="URL of DICOMweb, without /studies, that has the images. Default: `url`.")
    ] = None
    ca: Annotated[Path | None, Field(description="A PEM file: CAs of the certificates of both URLs.")] = None
    authorization_file: Annotated[
        Path | None,
        Field(description="A file with the Authorization header for both URLs, such as Bearer and a token."),
    ] = None
    station: Annotated[
        Filter | None, Field(description="Condition: Code Value of Scheduled Station Name Code Sequence.")
    ] = None
    workitem_code: Annotated[
        Filter | None, Field(description="Condition: Code Value of Scheduled Workitem Code Sequence.")
    ] = None
    label: Annotated[Filter | None, Field(description="Condition: Worklist Label.")] = None
    poll_s: Annotated[float, Field(gt=0, description="Seconds between two searches.")] = 10.0
    max_claimed: Annotated[int, Field(ge=1, description="Maximum number of workitems in progress.")] = 2
    max_images: Annotated[int, Field(ge=1, description="Maximum number of images of a workitem.")] = 100
    timeout_s: Annotated[
        float, Field(gt=0, description="Seconds to connect, and to wait for each part of a response.")
    ] = 60.0

    @model_validator(mode="after")
    def _require_condition(self) -> Self:
        if not (self.station or self.workitem_code or self.label):
            raise ValueError(
                "station: expected at least one of station, workitem_code and label, so that the gateway does not "
                "claim the workitems of others"
            )
        return self
