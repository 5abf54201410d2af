"""The `[[notifications]]` tables of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydicom.datadict import dictionary_VR, tag_for_keyword

from camserve_dicom.gateway.config_types import Address, Url

__all__ = ["HL7_ATTRIBUTES", "Notification"]

# Attributes that HL7 messages can have.
HL7_ATTRIBUTES = (
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyInstanceUID",
    "StudyDate",
)
# Value representations of sequences and binary data. Some attributes have a choice, such as "OB or OW".
_NOT_TEXT = frozenset({"SQ", "OB", "OD", "OF", "OL", "OV", "OW", "UN"})
# Values of MSH-3 to MSH-6 (HD) need no escape sequences.
HL7Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9 _.-]{0,20}$")]


class Notification(BaseModel):
    """A `[[notifications]]` table: another system that gets a message when the PACS has results."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern="^[a-z0-9_-]{1,32}$", description="Name in the audit trail and the spool.")]
    url: Annotated[Url | None, Field(description="URL of a webhook, which gets JSON by POST.")] = None
    ca: Annotated[Path | None, Field(description="A PEM file: CAs of the certificate of `url`.")] = None
    authorization_file: Annotated[
        Path | None, Field(description="A file with the Authorization header for `url`, such as Bearer and a token.")
    ] = None
    mllp: Annotated[Address | None, Field(description="HOST:PORT that gets HL7 v2 ORU^R01 by MLLP.")] = None
    tls: Annotated[bool, Field(description="Connect to `mllp` with TLS, with the files of [tls].")] = False
    sending_application: Annotated[HL7Name, Field(description="MSH-3 of HL7 messages.")] = "CAMSERVE"
    sending_facility: Annotated[HL7Name, Field(description="MSH-4.")] = ""
    receiving_application: Annotated[HL7Name, Field(description="MSH-5.")] = ""
    receiving_facility: Annotated[HL7Name, Field(description="MSH-6.")] = ""
    attributes: Annotated[
        list[str], Field(description="DICOM keywords of the image's header that the message has. Default: none.")
    ] = []
    about: Annotated[
        list[Literal["images", "studies"]],
        Field(min_length=1, description="What to notify about: images, and with [study] complete studies."),
    ] = ["images", "studies"]
    timeout_s: Annotated[float, Field(gt=0, description="Seconds to connect and for the response.")] = 30.0

    @model_validator(mode="after")
    def _require_one_destination(self) -> Self:
        if (self.url is None) == (self.mllp is None):
            raise ValueError("url: expected either url or mllp")
        only = ("tls",) if self.mllp is None else ("ca", "authorization_file")
        if wrong := [key for key in only if getattr(self, key)]:
            raise ValueError(f"{wrong[0]}: it does not apply to {'url' if self.mllp is None else 'mllp'}; remove it")
        of_patient = {"IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex"} & {*self.attributes}
        if self.mllp is not None and of_patient and "PatientID" not in self.attributes:
            raise ValueError("attributes: HL7 requires PatientID with other attributes of the patient; add it")
        for keyword in self.attributes:
            if self.mllp is not None and keyword not in HL7_ATTRIBUTES:
                raise ValueError(
                    f"attributes: an HL7 message has no place for {keyword!r}; expected some of "
                    f"{', '.join(HL7_ATTRIBUTES)}"
                )
            tag = tag_for_keyword(keyword)
            if tag is None or dictionary_VR(tag).split(" ")[0] in _NOT_TEXT:
                raise ValueError(
                    f"attributes: {keyword!r} is not the keyword of a DICOM attribute with text or numbers; expected "
                    "one such as PatientID"
                )
        return self
