"""Messages about results: HL7 v2.5.1 ORU^R01 and JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hl7apy.parser import parse_message
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from camserve_dicom.gateway.messages import Finding, Message, hl7_message, json_message
from camserve_dicom.gateway.notification_config import HL7_ATTRIBUTES, Notification

FINDING = Finding("a13b", 1, "effusion", None, {"probability": 0.93}, "chest", "sha256:76e8", "poly-cam", "", ())


def message(findings: tuple[Finding, ...] = (FINDING,), kind: str = "results.stored", **attributes: Any) -> Message:
    """Return a message about a header with these attributes."""
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    for name, value in ({"PatientID": "Q-4711"} | attributes).items():
        setattr(header, name, value)
    results = [("sc", "1.2.840.10008.5.1.4.1.1.7", "2.25.1")]
    return Message(
        kind, "0123456789ABCDEF0123", "a13b", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), header, results, findings
    )


def segments(said: Message) -> list[list[str]]:
    """Return the fields of each segment, after a check by hl7apy."""
    settings = Notification(name="ris", mllp="127.0.0.1:1", attributes=[*HL7_ATTRIBUTES])
    text = hl7_message(said, settings).decode()
    parse_message(text).validate()
    return [line.split("|") for line in text.removesuffix("\r").split("\r")]


def pid(**attributes: Any) -> list[str]:
    """Return the fields of PID, at least up to PID-8."""
    [found] = [each for each in segments(message(**attributes)) if each[0] == "PID"]
    return found + [""] * (9 - len(found))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada^Tarou^^^^^^A~山田^太郎^^^^^^I~やまだ^たろう^^^^^^P"),
        ("=山田^太郎", "山田^太郎"),
        ("Zwetschgé^Quirin^A^Dr.^MD", "Zwetschgé^Quirin^A^MD^Dr."),
        (["Zwetschge^Quirin", "Another"], "Zwetschge^Quirin"),
        ("^^^^", "^^^^^^U"),
        ("", "^^^^^^U"),
        ("O'Neill\r\nEVN|1", r"O'Neill EVN\F\1"),
    ],
)
def test_name(name: Any, expected: str) -> None:
    assert pid(PatientName=name)[5] == expected


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("19470228", "19470228"),
        ("1947.02.28", "19470228"),
        ("19470228 ", "19470228"),
        ("194702", ""),
        ("1947/2/8", ""),
        ("", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DA")
def test_date(date: str, expected: str) -> None:
    assert pid(PatientBirthDate=date)[7] == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_values_are_left_out() -> None:
    """A value that cannot be parsed must not keep the results from the PACS."""
    said = message(StudyTime="99")
    raw = RawDataElement(Tag("Rows"), "US", 3, b"abc", 0, False, True)
    said.header._dict[Tag("Rows")] = raw
    hook = Notification(name="hook", url="http://127.0.0.1:1/", attributes=["Rows", "StudyTime"])
    assert json.loads(json_message(said, hook))["attributes"] == {"StudyTime": "99"}


def test_id_with_a_backslash() -> None:
    assert pid(PatientID="HOSPITAL\\4711")[3] == r"HOSPITAL\E\4711"


def test_issuer_of_the_patient_id_is_the_assigning_authority() -> None:
    assert pid(IssuerOfPatientID="Klinik & Nord")[3] == r"Q-4711^^^Klinik \T\ Nord"
    assert pid()[3] == "Q-4711"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.93, "0.93"),
        (1.0, "1"),
        (0.0, "0"),
        (1.234567e-5, "0.0000123457"),
        (1e-15, "0"),
        (-0.25, "-0.25"),
        (123456.0, "123456"),
    ],
)
def test_numbers_have_no_exponent(value: float, expected: str) -> None:
    """NM of HL7 has none (v2.5.1, 2.A.47), and at most 16 characters."""
    finding = Finding("a", 1, "effusion", None, {"probability": value}, "m", "sha256:0", "cam", "", ())
    [found] = [each for each in segments(message((finding,))) if each[0] == "OBX" and each[2] == "NM"]
    assert found[5] == expected
    assert len(found[5]) <= 16


def test_numbers_that_are_not_finite_are_left_out() -> None:
    finding = Finding("a", 1, "", None, {"probability": 0.5, "drop": float("nan")}, "m", "sha256:0", "cam", "", ())
    assert [each[3] for each in segments(message((finding,))) if each[2:3] == ["NM"]] == [
        "probability^probability^99CAMSERVE"
    ]
    hook = Notification(name="hook", url="http://127.0.0.1:1/")
    assert json.loads(json_message(message((finding,)), hook))["scores"] == {"probability": 0.5}


def test_notice_belongs_to_the_whole_order() -> None:
    """A receiver reads NTE after an OBX as a comment on this observation."""
    assert [each[0] for each in segments(message())][:5] == ["MSH", "PID", "OBR", "NTE", "OBX"]


@pytest.mark.parametrize("number", [1, 2])
def test_no_two_observations_have_the_same_code_and_sub_id(number: int) -> None:
    finding = Finding("a", 1, "x", None, {"probability": 0.5}, "m", "sha256:0", "cam", "no", ("first", "second " * 40))
    said = segments(message((finding,) * number, "results.stored" if number == 1 else "study.stored"))
    observations = [(each[3], each[4]) for each in said if each[0] == "OBX"]
    assert len({*observations}) == len(observations)
    assert [each[1] for each in said if each[0] == "OBX"] == [str(1 + each) for each in range(len(observations))]


def test_study_has_a_finding_for_each_image() -> None:
    other = Finding("b", 0, "", ("60046008", "SCT", "Pleural effusion"), {"probability": 0.1}, "m", "d", "cam", "", ())
    said = message((FINDING, other), "study.stored")
    found = [each[4:6] for each in segments(said) if each[0] == "OBX" and each[3] == "121071^Finding^DCM"]
    assert found == [["1", "class-1^effusion^99CAMSERVE"], ["2", "60046008^Pleural effusion^SCT"]]
    content = json.loads(json_message(said, Notification(name="hook", url="http://127.0.0.1:1/")))
    assert content["type"] == "study.stored"
    assert [each["object"] for each in content["images"]] == ["a13b", "b"]
    assert content["images"][1]["target"]["code"]["value"] == "60046008"
