"""Messages of the gateway to other systems, received by a webhook and by HL7 engines."""

from __future__ import annotations

import json
import socket
import ssl
from datetime import datetime
from pathlib import Path
from typing import Any

import hl7
import pytest
import trustme

from camserve_dicom.gateway import workers
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.http_requests import HttpDestination
from camserve_dicom.gateway.notification_config import HL7_ATTRIBUTES
from tests.dicom.conftest import LogLines
from tests.dicom.gateways import OpenGateway
from tests.dicom.pacs import Pacs, image, send, wait_until
from tests.dicom.receivers import hl7_engine, tls_engine, webhook

RULE: dict[str, Any] = {
    "model": "tiny",
    "method": "grad-cam",
    "outputs": ["sc", "sr"],
    "metrics": ["average-gain"],
    "check": "average-gain>=0",
}
PACS = {"ae_title": "PACS", "address": "127.0.0.1:104"}
SECRETS = ("Zwetschge", "Quirin", "Q-4711", "19470229", "A-4712", "1.2.826", "Mirabelle", "20240203", "Obstgarten")


def fields(message: str, segment: str) -> list[list[str]]:
    """Return the fields of each segment of this type."""
    return [line.split("|") for line in message.split("\r") if line.startswith(f"{segment}|")]


def test_webhook_gets_one_message_without_the_header(gateway: OpenGateway, pacs: Pacs) -> None:
    with webhook() as hook, gateway(rules=[RULE], notifications=[{"name": "ris", "url": hook.url}]) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
        [(headers, message)] = hook.requests
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == message["id"]
    stored = {each.SOPInstanceUID: each.SOPClassUID for each in pacs.objects()}
    assert {each["sop_instance_uid"]: each["sop_class_uid"] for each in message["results"]} == stored
    assert [each["kind"] for each in message["results"]] == ["sc", "sr"]
    assert {*message["scores"]} == {"probability", "average-gain"}
    assert datetime.fromisoformat(message["time"]).tzinfo is not None
    assert (message["model"], message["method"], message["withheld"]) == ("tiny", "grad-cam", "")
    assert message["attributes"] == {}
    received, *_, notified = running.audit()
    assert notified["object"] == received["object"] == message["object"]
    assert (notified["notification"], notified["status"]) == ("ris", "HTTP 204")
    assert not any(secret in json.dumps(message) for secret in SECRETS)


def test_webhook_gets_the_configured_attributes(gateway: OpenGateway, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("Bearer s3cret\n")
    attributes = ["PatientName", "AccessionNumber", "ImageType", "PatientWeight", "ReferringPhysicianName"]
    with webhook() as hook:
        hooks = [{"name": "ris", "url": hook.url, "authorization_file": token, "attributes": attributes}]
        with gateway(notifications=hooks) as running:
            assert send(running.address, image(PatientName="Zwetschgé^Quirin", SpecificCharacterSet="ISO_IR 192")) == [
                0
            ]
            wait_until(lambda: hook.requests and running.idle())
    [(headers, message)] = hook.requests
    assert headers["authorization"] == "Bearer s3cret"
    assert message["attributes"] == {
        "PatientName": "Zwetschgé^Quirin",
        "AccessionNumber": "A-4712",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "ReferringPhysicianName": "Mirabelle^Frieda",
    }


def test_hl7_engine_accepts_the_message(gateway: OpenGateway) -> None:
    """hl7apy checks the structure of the message and the lengths and types of its fields."""
    name = r"Zwet|schge^Qu~irin^A\B^Prof.^Dr. & MD"
    with hl7_engine() as engine:
        table = {"name": "ris", "mllp": engine.address, "attributes": [*HL7_ATTRIBUTES], "receiving_application": "RIS"}
        with gateway(rules=[RULE], notifications=[table]) as running:
            assert send(running.address, image(PatientName=name.replace("\\", "/"))) == [0]
            wait_until(lambda: "notified" in running.events() and running.idle())
    [message] = engine.messages
    [msh], [pid], [obr] = fields(message, "MSH"), fields(message, "PID"), fields(message, "OBR")
    assert (msh[2], msh[4], msh[8], msh[11], msh[17]) == (
        "CAMSERVE",
        "RIS",
        "ORU^R01^ORU_R01",
        "2.5.1",
        "UNICODE UTF-8",
    )
    assert (pid[3], pid[7], pid[8]) == ("Q-4711", "19470229", "O")
    assert pid[5] == r"Zwet\F\schge^Qu\R\irin^A/B^Dr. \T\ MD^Prof."
    assert (obr[7], obr[18], obr[25]) == ("20240203", "A-4712", "R")
    found = {each[3].split("^")[0]: each for each in fields(message, "OBX")}
    assert found["113014"][2:6] == ["ST", "113014^DICOM Study^DCM", "", str(image().StudyInstanceUID)]
    assert found["121071"][5].endswith("^99CAMSERVE")
    assert 0 <= float(found["probability"][5]) <= 1
    assert {"average-gain", "model", "method", "uid-sc", "uid-sr"} <= found.keys()
    assert all(each[11] == "R" for each in found.values())
    assert "RESEARCH USE ONLY" in fields(message, "NTE")[0][3]
    assert running.audit()[-1]["status"] == "AA"


def test_hl7_message_has_no_header_by_default(gateway: OpenGateway) -> None:
    with hl7_engine() as engine, gateway(notifications=[{"name": "ris", "mllp": engine.address}]) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
    [message] = engine.messages
    assert fields(message, "PID") == []
    assert not any(secret in message for secret in SECRETS)


def test_hl7_message_with_the_id_of_the_patient_alone(gateway: OpenGateway) -> None:
    table = {"name": "ris", "attributes": ["PatientID"]}
    with hl7_engine() as engine, gateway(notifications=[table | {"mllp": engine.address}]) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
    [[*pid]] = fields(engine.messages[0], "PID")
    assert pid == ["PID", "1", "", "Q-4711", "", "^^^^^^U"]


def test_messages_have_the_code_of_the_class(gateway: OpenGateway) -> None:
    codes = [{"target": index, "code": "60046008", "scheme": "SCT", "meaning": "Effusion | any"} for index in range(10)]
    with webhook() as hook, hl7_engine() as engine:
        tables = [{"name": "a", "url": hook.url}, {"name": "b", "mllp": engine.address}]
        with gateway(classes=codes, notifications=tables) as running:
            assert send(running.address, image()) == [0]
            wait_until(lambda: running.events().count("notified") == 2 and running.idle())
    code = {"value": "60046008", "scheme": "SCT", "meaning": "Effusion | any"}
    assert hook.requests[0][1]["target"]["code"] == code
    [finding] = [each for each in fields(engine.messages[0], "OBX") if each[3].startswith("121071")]
    assert finding[5] == r"60046008^Effusion \F\ any^SCT"


def test_withheld_result_gives_the_reason(gateway: OpenGateway) -> None:
    rule = RULE | {"check": "average-gain>100"}
    with webhook() as hook, hl7_engine() as engine:
        tables = [{"name": "a", "url": hook.url}, {"name": "b", "mllp": engine.address}]
        with gateway(rules=[rule], notifications=tables) as running:
            assert send(running.address, image()) == [0]
            wait_until(lambda: running.events().count("notified") == 2 and running.idle())
    assert "average-gain" in hook.requests[0][1]["withheld"]
    assert [each["kind"] for each in hook.requests[0][1]["results"]] == ["sr"]
    assert [each for each in fields(engine.messages[0], "OBX") if each[3].startswith("withheld")]


@pytest.mark.parametrize("status", [408, 429, 503, 401])
def test_unavailable_webhook_gets_the_same_message_later(gateway: OpenGateway, status: int) -> None:
    answers = iter([(status, {"Retry-After": "0"}), (500, {})])
    with webhook() as hook, gateway(notifications=[{"name": "ris", "url": hook.url}]) as running:
        hook.status = lambda: next(answers, (200, {}))
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
    assert len(hook.requests) == 3
    assert hook.requests[0] == hook.requests[1] == hook.requests[2]


@pytest.mark.parametrize(
    ("wait", "expected_s"),
    [("20", 20.0), ("9" * 400, 3600.0), ("-1", None), ("", None), ("Fri, 27 Nov 2026 07:00:00 GMT", None)],
)
def test_wait_that_a_receiver_requests_is_limited(wait: str, expected_s: float | None) -> None:
    with webhook() as hook:
        hook.status = lambda: (503, {"Retry-After": wait})
        response = HttpDestination(hook.url, None, None, timeout_s=60).post(b"{}", {"Content-Type": "application/json"})
    assert response.is_temporary
    assert response.retry_after_s == expected_s


def test_rejecting_hl7_engine_gets_the_same_message_later(gateway: OpenGateway) -> None:
    codes = iter(["AR", "CR"])
    with hl7_engine() as engine, gateway(notifications=[{"name": "ris", "mllp": engine.address}]) as running:
        engine.code = lambda: next(codes, "CA")
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
    assert len(engine.messages) == 3
    assert len({*engine.messages}) == 1


def test_receivers_that_do_not_respond_do_not_block_others(gateway: OpenGateway, pacs: Pacs, log: LogLines) -> None:
    """The results are in the PACS, and one receiver is told once although two others fail."""
    with webhook() as hook:
        tables = [
            {"name": "down", "url": "http://127.0.0.1:1/"},
            {"name": "silent", "mllp": pacs.address, "timeout_s": 0.2},
            {"name": "works", "url": hook.url},
        ]
        with gateway(notifications=tables) as running:
            assert send(running.address, image()) == [0]
            wait_until(lambda: [line for line in log if line.get("stage") == "notify"])
            wait_until(lambda: "notified" in running.events())
            [entry] = running.entries("notify")
            assert {each.name for each in (entry / "unsent").iterdir()} == {"down", "silent"}
            assert len(hook.requests) == 1
            assert len(pacs.objects_by_uid) == 1


def test_refused_message_is_kept_and_can_be_sent_again(gateway: OpenGateway) -> None:
    """Other receivers get their messages. An operator moves the entry back when the cause is corrected."""
    with webhook() as hook, hl7_engine() as engine:
        tables = [{"name": "a", "mllp": engine.address}, {"name": "b", "url": hook.url}]
        with gateway(notifications=tables) as running:
            engine.code = lambda: "AE"
            hook.status = lambda: (400 if len(hook.requests) == 2 else 503, {})
            assert send(running.address, image()) == [0]
            wait_until(running.dead)
            assert len(engine.messages) == 1
            assert running.dead()[0]["reason"] == "a message was refused by a, b"
            reasons = [line["reason"] for line in running.audit() if line["event"] == "not notified"]
            assert reasons == ["acknowledgement AE", "HTTP 400"]
            engine.code = lambda: "AA"
            hook.status = lambda: (200, {})
            [entry] = running.entries("dead")
            entry.rename(entry.parent.parent / "notify" / entry.name)
            wait_until(lambda: running.events().count("notified") == 2 and running.idle())
    assert len({*engine.messages}) == 1


@pytest.mark.parametrize("wrong", ["AA|another", "Zwetschge"])
def test_invalid_acknowledgement_does_not_count(gateway: OpenGateway, log: LogLines, wrong: str) -> None:
    with hl7_engine() as engine, gateway(notifications=[{"name": "ris", "mllp": engine.address}]) as running:
        codes = iter([wrong])
        engine.code = lambda: next(codes, "AA")
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
    assert len(engine.messages) == 2
    assert "ris: the response is not an acknowledgement of the message" in [line.get("reason") for line in log]


def test_acknowledgement_with_line_feeds_counts(gateway: OpenGateway) -> None:
    with hl7_engine() as engine, gateway(notifications=[{"name": "ris", "mllp": engine.address}]) as running:
        engine.segment_end = "\r\n"
        assert send(running.address, image()) == [0]
        wait_until(lambda: "notified" in running.events() and running.idle())
    assert len(engine.messages) == 1


def test_silent_receiver_delays_no_message_to_others(gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first entry waits for the timeout. The others wait until the silent receiver is tried again."""
    monkeypatch.setattr(workers, "FIRST_RETRY_S", 300.0)
    with webhook() as hook, socket.create_server(("127.0.0.1", 0)) as silent:
        tables = [
            {"name": "a", "mllp": f"127.0.0.1:{silent.getsockname()[1]}", "timeout_s": 0.2},
            {"name": "b", "url": hook.url},
        ]
        with gateway(notifications=tables) as running:
            assert send(running.address, image(0), image(1), image(2)) == [0, 0, 0]
            wait_until(lambda: running.events().count("notified") == 3)
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_unreadable_file_of_one_receiver_does_not_keep_others_from_messages(
    gateway: OpenGateway, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    with webhook() as hook:
        tables = [
            {"name": "a", "url": hook.url, "authorization_file": token},
            {"name": "b", "url": hook.url},
        ]
        with gateway(notifications=tables) as running:
            assert send(running.address, image()) == [0]
            wait_until(lambda: "notified" in running.events())
            assert len(running.entries("notify")) == 1
            token.write_text("Bearer \u20ac")  # not possible in a header
            wait_until(lambda: running.entries("notify"))
            token.write_text("Bearer renewed")
            wait_until(lambda: running.events().count("notified") == 2 and running.idle())
    assert [headers.get("authorization") for headers, _ in hook.requests] == [None, "Bearer renewed"]


def test_study_gets_a_message(gateway: OpenGateway, pacs: Pacs) -> None:
    """One receiver is told about images and studies, one about the study only, and one about images only."""
    with webhook() as hook, hl7_engine() as engine:
        tables = [
            {"name": "a", "url": hook.url, "attributes": ["AccessionNumber", "Modality"]},
            {"name": "b", "mllp": engine.address, "about": ["studies"], "attributes": ["PatientID", "AccessionNumber"]},
            {"name": "c", "url": hook.url, "about": ["images"]},
        ]
        with gateway(
            study={"quiet_s": 3600, "expected_images": 2}, flags=[{"min_probability": 0.0}], notifications=tables
        ) as running:
            assert send(running.address, image(0), image(1)) == [0, 0]
            wait_until(lambda: running.events().count("notified") == 6 and running.idle())
            audit = running.audit()
    [study] = [message for _, message in hook.requests if message["type"] == "study.stored"]
    images = [message for _, message in hook.requests if message["type"] == "results.stored"]
    assert len(images) == 4
    assert {each["object"] for each in study["images"]} == {each["object"] for each in images}
    assert {each["target"]["index"] for each in study["images"]} == {each["target"]["index"] for each in images}
    assert {each["kind"] for each in study["results"]} == {"study", "flagged"}
    stored = {each.SOPInstanceUID for each in pacs.objects() if each.SeriesNumber >= 9008}
    assert {each["sop_instance_uid"] for each in study["results"]} == stored
    assert study["attributes"] == {"AccessionNumber": "A-4712"}
    [reported] = [line for line in audit if line["event"] == "study reported"]
    assert study["object"] == reported["object"]
    [message] = engine.messages
    assert fields(message, "OBR")[0][4] == "study-report^Saliency maps of a study^99CAMSERVE"
    assert [each[4] for each in fields(message, "OBX") if each[3].startswith("121071")] == ["1", "2"]
    assert "Zwetschge" not in message


def test_studies_without_their_table() -> None:
    notification = {"name": "a", "url": "http://127.0.0.1:1/", "about": ["studies"]}
    with pytest.raises(ValueError, match=r"notifications\.0\.about: .*add this table"):
        Config.model_validate({"spool": "s", "callers": ["A"], "pacs": PACS, "notifications": [notification]})


def test_hl7_over_tls_with_certificates_that_are_renewed(gateway: OpenGateway, tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own = ca.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    files = {"ca": tmp_path / "ca.pem", "key": tmp_path / "key.pem", "certificate": tmp_path / "cert.pem"}
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    own.configure_cert(client)
    ca.configure_trust(client)
    with tls_engine(context) as engine:
        table = {"name": "ris", "mllp": engine.address, "tls": True}
        with gateway(tls=files, notifications=[table]) as running:
            assert send(running.address, image(), tls=(client, "127.0.0.1")) == [0]
            wait_until(lambda: "notified" in running.events() and running.idle())
            # The certificate is renewed, and the CAs change with it.
            other = trustme.CA()
            renewed = other.issue_cert("127.0.0.1")
            renewed.private_key_pem.write_to_path(str(files["key"]))
            renewed.cert_chain_pems[0].write_to_path(str(files["certificate"]))
            other.cert_pem.write_to_path(str(files["ca"]))
            other.configure_trust(context)
            other.issue_cert("127.0.0.1").configure_cert(context)
            assert send(running.address, image(1), tls=(client, "127.0.0.1")) == [0]
            wait_until(lambda: running.events().count("notified") == 2 and running.idle())
    assert len(engine.messages) == 2
    assert hl7.parse(engine.messages[1]).segment("MSH")[9]


def test_notification_that_was_removed_from_the_configuration(gateway: OpenGateway) -> None:
    with gateway(notifications=[{"name": "old", "url": "http://127.0.0.1:1/"}]) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: running.entries("notify"))
    with gateway() as running:
        wait_until(running.dead)
    assert running.dead()[0]["reason"] == "a message was refused by old"
