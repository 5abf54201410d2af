"""The complete gateway with a modality, a camserve server and a PACS on the loopback address."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydicom.uid import BasicTextSRStorage, DeflatedExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from camserve_dicom.gateway import monitor
from camserve_dicom.gateway.config import ConfigError
from camserve_dicom.gateway.process import Gateway
from camserve_server.service.server import Server
from tests.dicom.conftest import LogLines
from tests.dicom.gateways import RULE, UNREACHABLE_SERVER, OpenGateway, Spooled, config, request
from tests.dicom.pacs import NAME, Pacs, image, send, wait_until
from tests.processes import LIMIT_S
from tests.promql import PROCESS_METRICS, documented

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


@contextmanager
def associated(running: Spooled) -> Iterator[Association]:
    """Open an association that sends nothing."""
    host, _, port = running.address.partition(":")
    modality = AE("MODALITY")
    modality.add_requested_context(Verification)
    association = modality.associate(host, int(port), ae_title="CAMSERVE")
    assert association.is_established or association.is_aborted
    try:
        yield association
    finally:
        association.abort()


# ---- from image to result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commits", ["same", "anew"])
def test_results_are_stored_and_committed(gateway: OpenGateway, pacs: Pacs, commits: str) -> None:
    pacs.commits = commits
    with gateway() as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
        wait_until(lambda: running.events().count("committed") == 2)
        wait_until(running.idle)
        wait_until(lambda: len(pacs.answers) == 2)
        assert pacs.answers == [0x0000, 0x0000]
        assert len(pacs.objects_by_uid) == len(pacs.stores) == len(pacs.requests) == 2
        sources = {each.SourceImageSequence[0].ReferencedSOPInstanceUID for each in pacs.objects()}
        assert sources == {image(0).SOPInstanceUID, image(1).SOPInstanceUID}
        assert {str(each.PatientName) for each in pacs.objects()} == {NAME}
        text = (running.spool / "audit.jsonl").read_text()
    for secret in (NAME, "Q-4711", "1.2.826", "2.25.", "Mirabelle", "19470229", "20240203", str(running.spool)):
        assert secret not in text
    assert {line.get("object") for line in map(json.loads, text.splitlines())} == {
        line["object"] for line in map(json.loads, text.splitlines()) if line["event"] == "received"
    }


@pytest.mark.slow
@pytest.mark.parametrize("selects_role", [True, False])
def test_commitment_report_of_another_ae_title(gateway: OpenGateway, pacs: Pacs, selects_role: bool) -> None:
    pacs.commits, pacs.reporter, pacs.selects_role = "anew", "ARCHIVE", selects_role
    with gateway(pacs={"commitment_ae_title": "ARCHIVE"}) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "committed" in running.events() and pacs.answers)
        assert send(running.address, image(1), calling="ARCHIVE") == [0x0124], "it may only report commitments"
        pacs.report_now("1.2.3")
        pacs.reporter = "MODALITY"
        pacs.report_now("1.2.3")
        assert pacs.answers == [0x0000, 0x0115, 0x0124], "an unknown transaction, and a caller that must not report"


@pytest.mark.slow
def test_entry_ends_after_storage_without_commitment(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway(pacs={"commitment": False}) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "stored" in running.events() and running.idle())
        assert (len(pacs.objects_by_uid), pacs.requests) == (1, [])


@pytest.mark.slow
def test_results_and_other_objects_are_dropped(gateway: OpenGateway, pacs: Pacs) -> None:
    """The gateway accepts and drops its own results, derived and raw images, and objects without pixels."""
    with gateway() as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "committed" in running.events() and running.idle())
        [own] = pacs.objects()
        report = image(1, SOPClassUID=BasicTextSRStorage)
        for attribute in ("Rows", "Columns", "PixelData"):
            delattr(report, attribute)
        derived = image(2, ImageType=["DERIVED", "SECONDARY"])
        raw = image(3, PresentationIntentType="FOR PROCESSING")
        assert send(running.address, own, report, derived, raw) == [0, 0, 0, 0]
        dropped = [line["reason"] for line in running.audit() if line["event"] == "dropped"]
        assert dropped == ["own", "no image", "derived", "for processing"]
        assert running.idle()
        assert running.events().count("explained") == 1


@pytest.mark.slow
def test_first_matching_rule_applies(gateway: OpenGateway, pacs: Pacs) -> None:
    rules = [
        {"modality": "CT", "ignore": True},
        RULE | {"body_part": ["chest"], "callers": ["OTHER"], "method": "random"},
        RULE | {"body_part": ["CHEST"], "method": "center-gaussian"},
        RULE,
    ]
    with gateway(rules=rules, callers=["MODALITY", "OTHER"]) as running:
        assert send(running.address, image(0, Modality="CT"), image(1), image(2, BodyPartExamined="HAND")) == [0, 0, 0]
        assert send(running.address, image(3), calling="OTHER") == [0]
        wait_until(lambda: running.events().count("committed") == 3)
        assert sorted(line["method"] for line in running.audit() if line["event"] == "explained") == [
            "center-gaussian",
            "grad-cam",
            "random",
        ]
        assert [line["reason"] for line in running.audit() if line["event"] == "dropped"] == ["no rule"]


# ---- callers and limits ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unknown_ae_titles_are_rejected(gateway: OpenGateway, log: LogLines) -> None:
    with gateway() as running:
        assert send(running.address, image(), calling="STRANGER") == []
        assert [line["peer"] for line in log if line["event"] == "association rejected"] == ["'STRANGER'"]
        assert send(running.address, image(), called="OTHER") == []
        assert send(running.address, image(), calling="PACS") == [0x0124], "the PACS may only report commitments"
        assert running.idle()


@pytest.mark.slow
def test_full_disk_or_queue_refuses_objects(gateway: OpenGateway) -> None:
    with gateway(max_waiting=1, server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image(0), image(1)) == [0, 0xA700]
        assert request(running, "/health")[0] == 503
    with gateway(min_free_bytes=1 << 60) as running:
        assert send(running.address, image(1)) == [0xA700]
        status, body = request(running, "/health")
        assert (status, json.loads(body)["wrong"]) == (
            503,
            ["the spool's disk has less free space than min_free_bytes"],
        )


@pytest.mark.slow
def test_too_large_object_is_aborted(gateway: OpenGateway) -> None:
    with gateway(max_object_bytes=100_000) as running:
        large = image(0, Rows=1000, Columns=1000, PixelData=bytes(2_000_000))
        assert send(running.address, large) == [None]
        assert send(running.address, image(1)) == [0]
        wait_until(lambda: "committed" in running.events())
        assert running.events()[0] == "too large"


def test_object_that_inflates_too_large_is_refused(gateway: OpenGateway) -> None:
    with gateway(max_object_bytes=100_000) as running:
        bomb = image(0, Rows=1000, Columns=1000, PixelData=bytes(2_000_000))
        fair = image(1)
        for each in (bomb, fair):
            each.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        assert send(running.address, bomb, fair) == [0xC000, 0]
        assert running.events()[:2] == ["too large", "received"]


@pytest.mark.slow
def test_limit_of_associations(gateway: OpenGateway) -> None:
    with gateway(max_associations=1) as running:
        with associated(running):
            assert send(running.address, image()) == []
        wait_until(lambda: send(running.address, image()) == [0])


@pytest.mark.slow
def test_idle_association_is_aborted(gateway: OpenGateway) -> None:
    with gateway(idle_s=0.5) as running, associated(running) as association:
        wait_until(lambda: association.is_aborted)


@pytest.mark.slow
def test_object_that_is_sent_twice_is_explained_once(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image(), image()) == [0, 0]
        assert len(running.entries("inbox")) == 1
    with gateway() as running:
        wait_until(lambda: "committed" in running.events())
        assert send(running.address, image()) == [0], "the object is explained again, with the same result"
        wait_until(lambda: running.events().count("committed") == 2)
    assert len(pacs.objects_by_uid) == 1


@pytest.mark.slow
def test_object_of_several_senders_at_once_is_explained_once(gateway: OpenGateway, pacs: Pacs) -> None:
    senders = [f"SENDER{number}" for number in range(5)]
    with gateway(server=UNREACHABLE_SERVER, callers=senders) as running, ThreadPoolExecutor(5) as pool:
        sent = pool.map(lambda title: send(running.address, image(), calling=title), senders)
        assert [*sent] == [[0]] * 5
        assert len(running.entries("inbox")) == 1
        assert running.events().count("dropped") == 4
    with gateway() as running:
        wait_until(lambda: "committed" in running.events())
    assert len(pacs.stores) == 1


# ---- monitor and spool ----------------------------------------------------------------------------------------------


def test_health_and_metrics(gateway: OpenGateway) -> None:
    with gateway() as running:
        assert send(running.address, image(0, BurnedInAnnotation="YES")) == [0]
        wait_until(running.dead)
        assert request(running, "/health") == (200, '{"status": "serving", "wrong": []}')
        status, metrics = request(running, "/metrics")
        assert status == 200
        for line in (
            'camserve_gateway_events_total{event="dead"} 1.0',
            'camserve_gateway_entries{stage="dead"} 1.0',
            'camserve_gateway_entries{stage="inbox"} 0.0',
            "camserve_gateway_free_bytes ",
        ):
            assert line in metrics
        assert request(running, "/other")[0] == 404


def test_all_metrics_are_documented(gateway: OpenGateway) -> None:
    with gateway() as running:
        assert send(running.address, image(0, BurnedInAnnotation="YES")) == [0]
        wait_until(running.dead)
        families = [*text_string_to_metric_families(request(running, "/metrics")[1])]
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels},
        )
        for family in families
    }
    process_metrics = {name for name in exported if name.startswith("process_")}
    assert process_metrics >= PROCESS_METRICS
    assert {name: exported[name] for name in exported.keys() - process_metrics} == documented("pacs.md")


@pytest.mark.slow
def test_health_reports_an_unreadable_spool(gateway: OpenGateway, capfd: pytest.CaptureFixture[str]) -> None:
    with gateway() as running:
        (running.spool / "inbox").rename(running.spool / "away")
        for path in ("/health", "/metrics"):
            assert request(running, path) == (503, '{"status": "not serving", "wrong": ["the spool cannot be read"]}')
        (running.spool / "away").rename(running.spool / "inbox")
        assert request(running, "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_monitor_closes_idle_connections(gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    assert monitor.MonitorRequestHandler.timeout is not None
    monkeypatch.setattr(monitor.MonitorRequestHandler, "timeout", 0.1)
    with gateway() as running:
        host, _, port = running.monitor.partition(":")
        with socket.create_connection((host, int(port)), timeout=LIMIT_S) as idle:
            assert idle.recv(1) == b""


@pytest.mark.slow
def test_spool_is_private_and_locked(gateway: OpenGateway, tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image()) == [0]
        found = [running.spool, *running.spool.rglob("*")]
        assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}
        assert {path.stat().st_mode & 0o077 for path in found if path.is_file()} == {0}
        with pytest.raises(ConfigError, match="spool: another gateway"):
            Gateway(config(tmp_path, tiny, pacs))
    running.spool.chmod(0o750)
    with pytest.raises(ConfigError, match="spool: other users can access"):
        Gateway(config(tmp_path, tiny, pacs))
    shutil.rmtree(running.spool)
    running.spool.write_text("")
    with pytest.raises(ConfigError, match="spool: "):
        Gateway(config(tmp_path, tiny, pacs))
