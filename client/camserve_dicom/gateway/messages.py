"""Messages about the results of an image: JSON for webhooks, and HL7 v2.5.1 ORU^R01."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import PersonName

from camserve_dicom.class_codes import ClassCode
from camserve_dicom.explaining import DicomExplanation
from camserve_dicom.gateway.notification_config import Notification
from camserve_dicom.overlay import WARNING

__all__ = ["Message", "hl7_message", "json_message"]

# Escape sequences of HL7 v2.5.1, 2.7.
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_SCHEME = "99CAMSERVE"
# Order of the fields of PID that may have a value.
_PID = {3: "PatientID", 7: "PatientBirthDate", 8: "PatientSex"}
# PID-5 is required. This value has only the type of the name: unspecified.
_NO_NAME = "^^^^^^U"
# OBR-25, and OBX-11: stored, not verified by a person (HL7 tables 0123 and 0085).
_NOT_VERIFIED = "R"


@dataclass(frozen=True)
class Message:
    """What a notification tells about an explained image.

    Attributes:
        identifier: Name of the message. It is the same each time that the message is sent.
        entry: Name of the image in the audit trail.
        time: Time of the explanation, with a time zone.
        made: The explanation and the result objects.
        code: Code of the explained class; None if the site provides none.
    """

    identifier: str
    entry: str
    time: datetime
    made: DicomExplanation
    code: ClassCode | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """The probability of the target, and the scores by the name of the metric, without those that are undefined."""
        explanation = self.made.explanation
        numbers = {"probability": explanation.target.probability, **explanation.scores}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}


def json_message(message: Message, notification: Notification) -> bytes:
    """Return the message as JSON in UTF-8. Of the header it has only the attributes that the notification names."""
    made, receipt, code = message.made, message.made.explanation.receipt, message.code
    content = {
        "id": message.identifier,
        "type": "results.stored",
        "time": message.time.isoformat(timespec="seconds"),
        "object": message.entry,
        "attributes": _attributes(made.image.source, notification.attributes),
        "model": receipt.model,
        "model_digest": receipt.model_digest,
        "method": receipt.method,
        "target": {
            "index": made.explanation.target.index,
            "label": made.explanation.target.label,
            "code": code and {"value": code.code, "scheme": code.scheme, "meaning": code.meaning},
        },
        "scores": message.numbers,
        "withheld": made.withheld,
        "warnings": [*made.warnings],
        "results": [
            {"kind": kind, "sop_class_uid": each.SOPClassUID, "sop_instance_uid": each.SOPInstanceUID}
            for kind, each in made.objects.items()
        ],
        "notice": WARNING,
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()


def hl7_message(message: Message, notification: Notification) -> bytes:
    """Return the message as HL7 ORU^R01 in UTF-8, without the frame of MLLP.

    The segments are MSH, PID if the message has a PatientID, OBR, one OBX for each observation, and NTE. Of the header
    they have only the attributes that the notification names; the other fields are empty.
    """
    made, receipt = message.made, message.made.explanation.receipt
    header = _attributes(made.image.source, notification.attributes)
    time = message.time.strftime("%Y%m%d%H%M%S%z")
    n = notification
    msh = [
        "MSH",
        "^~\\&",
        n.sending_application,
        n.sending_facility,
        n.receiving_application,
        n.receiving_facility,
        time,
    ]
    msh += ["", "ORU^R01^ORU_R01", message.identifier, "P", "2.5.1", "", "", "", "", "", "UNICODE UTF-8"]
    segments = [msh]
    if header.get("PatientID"):  # PID requires it, and a message may lack PID
        pid = ["PID", "1", *[""] * 7]
        for field, keyword in _PID.items():
            pid[field] = _escape(header.get(keyword, ""))
        pid[5] = _person_name(made.image.source.PatientName) if "PatientName" in header else _NO_NAME
        segments.append(pid)
    obr = ["OBR", "1", "", _escape(message.identifier), _code("saliency-map", "Saliency map"), "", ""] + [""] * 19
    obr[7] = _escape(header.get("StudyDate", ""))
    obr[18] = _escape(header.get("AccessionNumber", ""))
    obr[22], obr[25] = time, _NOT_VERIFIED
    segments.append(obr)
    target, code = made.explanation.target, message.code
    finding = (code.code, code.meaning, code.scheme) if code else (f"class-{target.index}", target.label)
    values = [
        ("CWE", "121071^Finding^DCM", _code(*finding)),
        *(("NM", _code(name), f"{value:.6g}") for name, value in message.numbers.items()),
        ("ST", _code("model"), _escape(f"{receipt.model} {receipt.model_digest}")),
        ("ST", _code("method"), _escape(receipt.method)),
        *(("ST", _code(f"uid-{kind}", f"UID of {kind}"), each.SOPInstanceUID) for kind, each in made.objects.items()),
        *(("ST", _code("withheld"), _escape(reason)) for reason in filter(None, [made.withheld])),
        *(("ST", _code("warning"), _escape(warning)) for warning in made.warnings),
    ]
    if uid := header.get("StudyInstanceUID"):  # as in IHE Radiology, RAD-128
        values.insert(0, ("HD", "113014^DICOM Study^DCM", uid))
    for number, (kind, name, value) in enumerate(values, 1):
        segments.append(["OBX", str(number), kind, name, "", value, "", "", "", "", "", _NOT_VERIFIED])
    segments.append(["NTE", "1", "", WARNING])
    return "".join("|".join(segment).rstrip("|") + "\r" for segment in segments).encode()


def _attributes(source: Dataset, keywords: Iterable[str]) -> dict[str, Any]:
    """Return the values of attributes as text, a list for several values; without those that are missing or empty."""
    values = {}
    for keyword in keywords:
        value = source.get(keyword)
        if value is None or value == "":
            continue
        values[keyword] = [*map(str, value)] if isinstance(value, MultiValue) else str(value)
    return values


def _person_name(name: PersonName) -> str:
    """Return a name as XPN of HL7, whose suffix comes before the prefix."""
    parts = (name.family_name, name.given_name, name.middle_name, name.name_suffix, name.name_prefix)
    return "^".join(map(_escape, parts)).rstrip("^")


def _code(code: str, meaning: str = "", scheme: str = _SCHEME) -> str:
    """Return a code as CWE."""
    return "^".join(map(_escape, (code, meaning or code, scheme)))


def _escape(value: Any) -> str:
    text = "~".join(value) if isinstance(value, list) else str(value)
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text).translate(_ESCAPES)
