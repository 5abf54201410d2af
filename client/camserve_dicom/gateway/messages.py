"""Messages about the results of an image or a study: JSON for webhooks, and HL7 v2.5.1 ORU^R01."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import PersonName

from camserve_dicom.gateway.notification_config import Notification
from camserve_dicom.overlay import WARNING
from camserve_dicom.source_header import readable_element

__all__ = ["Finding", "Message", "hl7_message", "json_message"]

# Escape sequences of HL7 v2.5.1, 2.7.
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_SCHEME = "99CAMSERVE"
# PID-5 is required. This value has only the type of the name: unspecified.
_NO_NAME = "^^^^^^U"
# OBR-25, and OBX-11: stored, not verified by a person (HL7 tables 0123 and 0085).
_NOT_VERIFIED = "R"
# OBR-4, by the type of the message.
_SERVICES = {
    "results.stored": ("saliency-map", "Saliency map"),
    "study.stored": ("study-report", "Saliency maps of a study"),
}


@dataclass(frozen=True)
class Finding:
    """Findings of an explained image, as messages contain them.

    Attributes:
        object: Name of the image in the audit trail.
        index: Class index.
        label: Class label; may be empty.
        code: (value, scheme, meaning) of the class that the site provides; None if it provides none.
        values: Probability and scores by name. Values that are not finite are left out of messages.
        model: Name of the model.
        model_digest: Digest of the model.
        method: Name of the method.
        withheld: The reason why the overlay is withheld, or empty.
        warnings: Warnings.
    """

    object: str
    index: int
    label: str
    code: tuple[str, str, str] | None
    values: dict[str, float]
    model: str
    model_digest: str
    method: str
    withheld: str
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the keys of the JSON message."""
        return {
            "model": self.model,
            "model_digest": self.model_digest,
            "method": self.method,
            "target": {
                "index": self.index,
                "label": self.label,
                "code": dict(zip(("value", "scheme", "meaning"), self.code, strict=True)) if self.code else None,
            },
            "scores": {name: value for name, value in self.values.items() if math.isfinite(value)},
            "withheld": self.withheld,
            "warnings": [*self.warnings],
        }

    def to_observations(self, sub_id: str) -> list[list[str]]:
        """Return (value type, code, sub-id, value) of the segments OBX."""
        value, scheme, meaning = self.code or (f"class-{self.index}", _SCHEME, self.label)
        return [
            ["CWE", "121071^Finding^DCM", sub_id, _code(value, meaning, scheme)],
            *(["NM", _code(name), sub_id, _number(each)] for name, each in self.values.items() if math.isfinite(each)),
            ["ST", _code("model"), sub_id, _escape(f"{self.model} {self.model_digest}")],
            ["ST", _code("method"), sub_id, _escape(self.method)],
            *(["TX", _code("withheld"), sub_id, _escape(reason)] for reason in filter(None, [self.withheld])),
            # Observations with the same code need different sub-ids (HL7 v2.5.1, 7.4.2.4).
            *(
                ["TX", _code("warning"), f"{sub_id or 1}.{number}", _escape(warning)]
                for number, warning in enumerate(self.warnings, 1)
            ),
        ]


@dataclass(frozen=True)
class Message:
    """Content of a message about an image or a study, independent of its format.

    Attributes:
        type: "results.stored" for an image, "study.stored" for a study.
        identifier: Name of the message. It is the same each time that the message is sent.
        object: Name of the image or the report of the study in the audit trail.
        time: Time of the explanation or the report, with a time zone.
        header: The header of the image, or the attributes of patient and study that results copy.
        results: (kind, SOP Class UID, SOP Instance UID) of the result objects.
        findings: What to say about the image, or each image of the study.
    """

    type: str
    identifier: str
    object: str
    time: datetime
    header: Dataset
    results: Sequence[tuple[str, str, str]]
    findings: Sequence[Finding]


def json_message(message: Message, notification: Notification) -> bytes:
    """Return the message as JSON in UTF-8. Of the header it has only the attributes that the notification names."""
    if message.type == "results.stored":
        told = message.findings[0].to_json()
    else:
        told = {"images": [{"object": each.object} | each.to_json() for each in message.findings]}
    content = {
        "id": message.identifier,
        "type": message.type,
        "time": message.time.isoformat(timespec="seconds"),
        "object": message.object,
        "attributes": _attributes(message.header, notification.attributes),
        **told,
        "results": [
            {"kind": kind, "sop_class_uid": sop_class, "sop_instance_uid": uid}
            for kind, sop_class, uid in message.results
        ],
        "notice": WARNING,
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()


def hl7_message(message: Message, notification: Notification) -> bytes:
    """Return the message as HL7 ORU^R01 in UTF-8, without the frame of MLLP.

    The segments are MSH, PID if the message has a PatientID, OBR, NTE, and one OBX for each observation. NTE follows
    OBR, because after an OBX it would be a comment on this observation only. Of the header the segments have only the
    attributes that the notification names; the other fields are empty.
    """
    header, n = _attributes(message.header, notification.attributes), notification
    time = message.time.strftime("%Y%m%d%H%M%S%z")
    msh = ["MSH", "^~\\&", n.sending_application, n.sending_facility, n.receiving_application, n.receiving_facility]
    msh += [time, "", "ORU^R01^ORU_R01", message.identifier, "P", "2.5.1", "", "", "", "", "", "UNICODE UTF-8"]
    segments = [msh]
    if header.get("PatientID"):  # PID requires it, and a message may lack PID
        issuer = _escape(header.get("IssuerOfPatientID", ""))
        pid = ["PID", "1", *[""] * 7]
        pid[3] = _escape(header["PatientID"]) + (f"^^^{issuer}" if issuer else "")
        pid[5] = (_person_name(message.header.PatientName) if "PatientName" in header else "") or _NO_NAME
        pid[7], pid[8] = _date(header.get("PatientBirthDate", "")), _escape(header.get("PatientSex", ""))
        segments.append(pid)
    obr = ["OBR", "1", "", _escape(message.identifier), _code(*_SERVICES[message.type]), "", ""] + [""] * 19
    obr[7] = _date(header.get("StudyDate", ""))
    obr[18] = _escape(header.get("AccessionNumber", ""))
    obr[22], obr[25] = time, _NOT_VERIFIED
    segments += [obr, ["NTE", "1", "", WARNING]]
    observations = []
    if uid := header.get("StudyInstanceUID"):  # as in messages of IHE Radiology
        observations.append(["ST", "113014^DICOM Study^DCM", "", _escape(uid)])
    for number, finding in enumerate(message.findings, 1):
        observations += finding.to_observations(str(number) if len(message.findings) > 1 else "")
    observations += [
        ["ST", _code(f"uid-{kind}", f"UID of {kind}"), "", _escape(uid)] for kind, _, uid in message.results
    ]
    for number, (kind, *rest) in enumerate(observations, 1):
        segments.append(["OBX", str(number), kind, *rest, "", "", "", "", "", _NOT_VERIFIED])
    return "".join("|".join(segment).rstrip("|") + "\r" for segment in segments).encode()


def _attributes(source: Dataset, keywords: Iterable[str]) -> dict[str, Any]:
    """Return the values of attributes as text, a list for several values; without empty and unreadable ones."""
    values = {}
    for keyword in keywords:
        element = readable_element(source, keyword)
        value = None if element is None else element.value
        if value is None or value == "":
            continue
        values[keyword] = [*map(str, value)] if isinstance(value, MultiValue) else str(value)
    return values


def _person_name(name: PersonName | MultiValue[PersonName]) -> str:
    """Return a name as XPN of HL7, whose suffix comes before the prefix.

    A name with ideographic or phonetic groups gives a repetition for each group, with its representation (table 0465).
    """
    first = name[0] if isinstance(name, MultiValue) else name  # several values are invalid
    groups = []
    for group, representation in zip(first.components, "AIP", strict=False):
        family, given, middle, prefix, suffix = (group.split("^") + [""] * 5)[:5]
        if parts := "^".join(map(_escape, (family, given, middle, suffix, prefix))).rstrip("^"):
            groups.append((parts, representation))
    if len(groups) == 1:
        return groups[0][0]
    return "~".join(f"{parts}{'^' * (7 - parts.count('^'))}{representation}" for parts, representation in groups)


def _date(value: Any) -> str:
    """Return a date of DICOM as a date of HL7, also in the old form with dots; empty if it is none."""
    digits = str(value).strip().replace(".", "")
    return digits if re.fullmatch(r"[0-9]{8}", digits) else ""


def _number(value: float) -> str:
    """Return a number as NM of HL7, which has at most 16 characters and no exponent."""
    return f"{float(f'{value:.6g}'):.12f}".rstrip("0").rstrip(".")


def _code(code: str, meaning: str = "", scheme: str = _SCHEME) -> str:
    """Return a code as CE or CWE."""
    return "^".join(map(_escape, (code, meaning or code, scheme)))


def _escape(value: Any) -> str:
    text = "\\".join(value) if isinstance(value, list) else str(value)  # as in the header
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text).translate(_ESCAPES)
