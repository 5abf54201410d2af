"""The gateway from one end to the other: a modality, a camserve server and a PACS that are real, on loopback."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import BasicTextSRStorage, DeflatedExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification

from camserve_dicom.gateway import monitor
from camserve_dicom.gateway.config import ConfigError
from camserve_dicom.gateway.process import Gateway
from camserve_server.service.server import Server
from tests.dicom.gateways import RULE, Opened, Spooled, asked, config, nobody
from tests.dicom.pacs import NAME, Pacs, image, send, until

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


@contextmanager
def associated(running: Spooled) -> Iterator[Association]:
    """A modality that says nothing."""
    host, _, port = running.address.partition(":")
    modality = AE("MODALITY")
    modality.add_requested_context(Verification)
    association = modality.associate(host, int(port), ae_title="CAMSERVE")
    assert association.is_established
    try:
        yield association
    finally:
        association.abort()


# ---- from image to result --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commits", ["same", "anew"])
def test_results_are_stored_and_committed(gateway: Opened, pacs: Pacs, commits: str) -> None:
    pacs.commits = commits
    with gateway() as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
        until(lambda: running.events().count("committed") == 2)
        until(running.idle)
        assert len(pacs.kept) == len(pacs.stores) == len(pacs.asked) == 2
        sources = {each.SourceImageSequence[0].ReferencedSOPInstanceUID for each in pacs.objects()}
        assert sources == {image(0).SOPInstanceUID, image(1).SOPInstanceUID}
        assert {str(each.PatientName) for each in pacs.objects()} == {NAME}
        text = (running.spool / "audit.jsonl").read_text()
    for said in (NAME, "Q-4711", "1.2.826", "2.25.", "Mirabelle", "19470229", "20240203", str(running.spool)):
        assert said not in text
    assert {line.get("object") for line in map(json.loads, text.splitlines())} == {
        line["object"] for line in map(json.loads, text.splitlines()) if line["event"] == "received"
    }


@pytest.mark.parametrize("selects_role", [True, False])
def test_another_of_the_archive_says_what_is_committed(gateway: Opened, pacs: Pacs, selects_role: bool) -> None:
    pacs.commits, pacs.reporter, pacs.selects_role = "anew", "ARCHIVE", selects_role
    with gateway(pacs={"commitment_ae_title": "ARCHIVE"}) as running:
        assert send(running.address, image()) == [0]
        until(lambda: "committed" in running.events())
        assert send(running.address, image(1), calling="ARCHIVE") == [0x0124], "it may say that alone"


def test_without_commitment_it_ends_when_all_is_stored(gateway: Opened, pacs: Pacs) -> None:
    with gateway(pacs={"commitment": False}) as running:
        assert send(running.address, image()) == [0]
        until(lambda: "stored" in running.events() and running.idle())
        assert (len(pacs.kept), pacs.asked) == (1, [])


def test_no_result_is_explained_again(gateway: Opened, pacs: Pacs) -> None:
    """The loop guard: what is the gateway's own, derived or no image is accepted and dropped."""
    with gateway() as running:
        assert send(running.address, image()) == [0]
        until(lambda: "committed" in running.events())
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


def test_rules_say_what_becomes_of_an_object(gateway: Opened, pacs: Pacs) -> None:
    rules = [
        {"modality": "CT", "ignore": True},
        RULE | {"body_part": ["chest"], "callers": ["OTHER"], "method": "random"},
        RULE | {"body_part": ["CHEST"], "method": "center-gaussian"},
        RULE,
    ]
    with gateway(rules=rules, callers=["MODALITY", "OTHER"]) as running:
        assert send(running.address, image(0, Modality="CT"), image(1), image(2, BodyPartExamined="HAND")) == [0, 0, 0]
        assert send(running.address, image(3), calling="OTHER") == [0]
        until(lambda: running.events().count("committed") == 3)
        assert sorted(line["method"] for line in running.audit() if line["event"] == "explained") == [
            "center-gaussian",
            "grad-cam",
            "random",
        ]
        assert [line["reason"] for line in running.audit() if line["event"] == "dropped"] == ["no rule"]


# ---- who may, and how much -------------------------------------------------------------------------------------------


def test_strangers_are_turned_away(gateway: Opened, log: list[MutableMapping[str, Any]]) -> None:
    with gateway() as running:
        assert send(running.address, image(), calling="STRANGER") == []
        assert [line["peer"] for line in log if line["event"] == "association rejected"] == ["'STRANGER'"]
        assert send(running.address, image(), called="OTHER") == []
        assert send(running.address, image(), calling="PACS") == [0x0124], "it may only say what it has committed"
        assert running.idle()


def test_a_full_disk_or_queue_refuses_for_now(gateway: Opened) -> None:
    with gateway(max_waiting=1, server=nobody()) as running:
        assert send(running.address, image(0), image(1)) == [0, 0xA700]
        assert asked(running, "/health")[0] == 503
    with gateway(min_free_bytes=1 << 60) as running:
        assert send(running.address, image(1)) == [0xA700]
        status, body = asked(running, "/health")
        assert (status, json.loads(body)["wrong"]) == (503, ["the spool's disk is full"])


def test_what_is_too_large_is_aborted(gateway: Opened) -> None:
    with gateway(max_object_bytes=100_000) as running:
        large = image(0, Rows=1000, Columns=1000, PixelData=bytes(2_000_000))
        assert send(running.address, large) == [None]
        assert send(running.address, image(1)) == [0]
        until(lambda: "committed" in running.events())
        assert running.events()[0] == "too large"


def test_what_is_too_large_once_inflated_is_refused(gateway: Opened) -> None:
    with gateway(max_object_bytes=100_000) as running:
        bomb = image(0, Rows=1000, Columns=1000, PixelData=bytes(2_000_000))
        fair = image(1)
        for each in (bomb, fair):
            each.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        assert send(running.address, bomb, fair) == [0xC000, 0]
        assert running.events()[:2] == ["too large", "received"]


def test_no_more_associations_than_are_allowed(gateway: Opened) -> None:
    with gateway(max_associations=1) as running:
        with associated(running):
            assert send(running.address, image()) == []
        until(lambda: send(running.address, image()) == [0])


def test_who_is_silent_is_sent_away(gateway: Opened) -> None:
    with gateway(idle_s=0.3) as running, associated(running) as association:
        until(lambda: association.is_aborted)


def test_the_same_object_twice_is_one(gateway: Opened, pacs: Pacs) -> None:
    with gateway(server=nobody()) as running:
        assert send(running.address, image(), image()) == [0, 0]
        assert len(running.entries("inbox")) == 1
    with gateway() as running:
        until(lambda: "committed" in running.events())
        assert send(running.address, image()) == [0], "it is explained anew, to the same object"
        until(lambda: running.events().count("committed") == 2)
    assert len(pacs.kept) == 1


# ---- what is watched, and the spool ----------------------------------------------------------------------------------


def test_health_and_metrics(gateway: Opened) -> None:
    with gateway() as running:
        assert send(running.address, image(0, BurnedInAnnotation="YES")) == [0]
        until(running.dead)
        assert asked(running, "/health") == (200, '{"status": "serving", "wrong": []}')
        status, metrics = asked(running, "/metrics")
        assert status == 200
        for line in (
            'camserve_gateway_events_total{event="dead"} 1.0',
            'camserve_gateway_entries{stage="dead"} 1.0',
            'camserve_gateway_entries{stage="inbox"} 0.0',
            "camserve_gateway_free_bytes ",
        ):
            assert line in metrics
        assert asked(running, "/other")[0] == 404


def test_a_spool_that_is_gone_is_no_health(gateway: Opened, capfd: pytest.CaptureFixture[str]) -> None:
    with gateway() as running:
        (running.spool / "inbox").rename(running.spool / "away")
        for path in ("/health", "/metrics"):
            assert asked(running, path) == (503, '{"status": "not serving", "wrong": ["the spool cannot be read"]}')
        (running.spool / "away").rename(running.spool / "inbox")
        assert asked(running, "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_who_watches_and_says_nothing_is_sent_away(gateway: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    assert monitor.MonitorRequestHandler.timeout is not None
    monkeypatch.setattr(monitor.MonitorRequestHandler, "timeout", 0.1)
    with gateway() as running:
        host, _, port = running.monitor.partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as silent:
            assert silent.recv(1) == b""


def test_only_the_owner_looks_into_the_spool(gateway: Opened, tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    with gateway(server=nobody()) as running:
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
