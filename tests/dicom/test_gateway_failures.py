"""Failures of the PACS, the server, the disk and the process, and how the gateway continues."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from camserve import Client
from camserve.errors import InternalError
from camserve_dicom import explain
from camserve_dicom.gateway import pacs as pacs_module
from camserve_dicom.gateway import steps, workers
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure
from tests.dicom.conftest import LogLines
from tests.dicom.gateways import RULE, UNREACHABLE_SERVER, OpenGateway
from tests.dicom.pacs import Pacs, image, send, wait_until
from tests.processes import LIMIT_S

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


def temporary_failures(log: LogLines) -> list[str]:
    """Return the reasons of temporary failures in the log."""
    return [line["reason"] for line in log if line["event"] == "step will be retried"]


@pytest.mark.slow
def test_storage_is_retried_while_the_pacs_is_down(gateway: OpenGateway, pacs: Pacs) -> None:
    pacs.down()
    with gateway() as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
        wait_until(lambda: len(running.entries("outbox")) == 2)
        pacs.up()
        wait_until(lambda: running.events().count("committed") == 2)
        assert len(pacs.objects_by_uid) == 2
        assert running.dead() == []


def test_storage_status(gateway: OpenGateway, pacs: Pacs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL_INTERVAL_S", 0.1)
    answers = iter([0xA701, 0xB000])
    pacs.before = lambda dataset: next(answers, None)
    with gateway() as running:
        assert send(running.address, image(0)) == [0]
        wait_until(lambda: "committed" in running.events())
        assert [line["status"] for line in running.audit() if line["event"] == "stored"] == ["0xb000"]
        pacs.before = lambda dataset: 0xC123
        assert send(running.address, image(1)) == [0]
        wait_until(running.dead)
        assert [(each["stage"], each["reason"]) for each in running.dead()] == [("outbox", "status 0xc123")]
        # The step is repeated after an operator moves the entry back.
        pacs.before = lambda dataset: 0x0111
        [dead] = running.entries("dead")
        dead.rename(running.spool / "outbox" / dead.name)
        wait_until(lambda: len(pacs.requests) == 2)


@pytest.mark.slow
def test_rejected_association_is_a_permanent_failure(gateway: OpenGateway, pacs: Pacs) -> None:
    pacs.accept_only("OTHER")
    with gateway() as running:
        assert send(running.address, image()) == [0]
        wait_until(running.dead)
        assert "rejects the association" in running.dead()[0]["reason"]


@pytest.mark.slow
def test_pacs_aborts_between_two_objects(gateway: OpenGateway, pacs: Pacs) -> None:
    pacs.hangs_up = True
    with gateway(rules=[{**RULE, "outputs": ["sc", "sr"]}]) as running:
        assert send(running.address, image()) == [0]
        wait_until(running.idle)
        assert len(pacs.objects_by_uid) == 2
        assert running.dead() == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_report_in_same_association")
def test_interrupted_return_of_a_missing_result_continues(gateway: OpenGateway, pacs: Pacs) -> None:
    """The process was killed after it moved a result back to results/, and before it moved the entry to outbox."""
    pacs.commits = "never"
    with gateway() as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: pacs.requests)
    [entry] = running.entries("stored")
    [sent] = (entry / "sent").iterdir()
    sent.rename(entry / "results" / sent.name)
    pacs.commits = "anew"
    with gateway() as running:
        wait_until(running.idle)
        assert len(pacs.stores) == 2
        assert running.events()[-1] == "committed"


@pytest.mark.slow
def test_internal_server_errors_are_retried_ten_times(
    gateway: OpenGateway, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        if times <= faults:
            raise InternalError("an internal error")
        return explain(*arguments, **options)

    monkeypatch.setattr(steps, "explain", failing)
    monkeypatch.setattr(workers, "MAX_RETRY_S", 0.02)
    faults = 3
    with gateway() as running:
        assert send(running.address, image()) == [0]
        wait_until(running.idle)
        assert len(pacs.objects_by_uid) == 1
        faults, times = 99, 0
        assert send(running.address, image(1)) == [0]
        wait_until(running.dead)
        assert (running.dead()[0]["reason"], times) == ("InternalError", 10)


def test_shutdown_before_the_request_is_no_failure_of_the_server(
    gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's failures are counted, and the tenth one moves the object to `dead`."""
    reading, workers_of_images = threading.Event(), list[threading.Thread]()

    def explain_late(client: Client, *arguments: Any, **options: Any) -> Any:
        workers_of_images.append(threading.current_thread())
        reading.set()
        wait_until(lambda: client._closed)
        return explain(client, *arguments, **options)

    monkeypatch.setattr(steps, "explain", explain_late)
    with gateway(grace_s=0) as running:
        assert send(running.address, image()) == [0]
        assert reading.wait(LIMIT_S)
    workers_of_images[0].join(LIMIT_S)
    [entry] = running.entries("inbox")
    assert sorted(each.name for each in entry.iterdir()) == ["entry.json", "source.dcm"]


def test_too_long_pdu_is_not_read(gateway: OpenGateway) -> None:
    with gateway() as running, socket.create_connection(host_and_port(running.address), timeout=LIMIT_S) as peer:
        peer.sendall(struct.pack(">BBL", 1, 0, 1 << 31) + bytes(4096))
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1) == b"", "the gateway closes the connection"


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


@pytest.mark.slow
def test_full_disk_stops_explanations(gateway: OpenGateway, pacs: Pacs, log: LogLines) -> None:
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image()) == [0]
    with gateway(min_free_bytes=1 << 60) as running:
        wait_until(lambda: "the disk has less free space than min_free_bytes" in temporary_failures(log))
        assert len(running.entries("inbox")) == 1
        assert "explained" not in running.events()
    with gateway() as running:
        wait_until(running.idle)
        assert len(pacs.objects_by_uid) == 1


@pytest.mark.slow
def test_failed_commitments_are_retried_three_times(gateway: OpenGateway, pacs: Pacs) -> None:
    """Results are stored again after a failed commitment; the third failure is permanent."""
    pacs.commits = "failed"
    with gateway() as running:
        assert send(running.address, image()) == [0]
        wait_until(running.dead)
        assert running.dead()[0]["reason"] == "the PACS reported a failed commitment 3 times"
        assert running.events().count("stored") == len(pacs.stores) == 3
        assert [line["reasons"] for line in running.audit() if line["event"] == "not committed"] == [["0x0112"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("end", [None, TemporaryFailure("aborted"), PermanentFailure("aborted")])
def test_result_is_stored_again_before_the_association_of_the_report_ends(
    gateway: OpenGateway, pacs: Pacs, monkeypatch: pytest.MonkeyPatch, end: Exception | None
) -> None:
    request_commitment = pacs_module.DimsePacs.request_commitment

    def request(self: pacs_module.DimsePacs, *arguments: Any) -> None:
        request_commitment(self, *arguments)
        if len(pacs.requests) == 1:
            pacs.commits = "same"
            wait_until(lambda: running.events().count("stored") == 2 and running.entries("stored"))
            if end:
                raise end

    monkeypatch.setattr(pacs_module.DimsePacs, "request_commitment", request)
    pacs.commits = "failed"
    with gateway() as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: "committed" in running.events())
        wait_until(running.idle)
        assert running.dead() == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_report_in_same_association")
@pytest.mark.parametrize("commits", ["never", "stuck"])
def test_commitment_request_without_report_is_repeated(
    gateway: OpenGateway, pacs: Pacs, commits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_module, "RELEASE_TIMEOUT_S", 0.2)
    pacs.commits = commits
    with gateway(pacs={"commitment_timeout_s": 0.2}) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: len(pacs.requests) >= 2)
        assert len(set(pacs.requests[:2])) == 2
        assert len(pacs.stores) == 1
        pacs.commits = "anew"
        wait_until(lambda: "committed" in running.events())


@pytest.mark.slow
@pytest.mark.usefixtures("no_report_in_same_association")
def test_late_report_on_an_earlier_request(gateway: OpenGateway, pacs: Pacs) -> None:
    pacs.commits = "later"
    with gateway(pacs={"commitment_timeout_s": 0.2}) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: len(pacs.requests) >= 2)
        pacs.report_now(pacs.requests[0])
        wait_until(lambda: "committed" in running.events())
        wait_until(running.idle)


@pytest.mark.slow
def test_unexplainable_object_is_a_permanent_failure(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway() as running:
        assert send(running.address, image(0, BurnedInAnnotation="YES"), image(1)) == [0, 0]
        wait_until(lambda: running.dead() and "committed" in running.events())
        [why] = running.dead()
        assert (why["stage"], why["reason"]) == ("inbox", "BURNED_IN_ANNOTATION")
        assert len(pacs.objects_by_uid) == 1, "the other object is explained"


@pytest.mark.slow
def test_object_that_crashes_the_process_is_a_permanent_failure(gateway: OpenGateway, tmp_path: Path) -> None:
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image()) == [0]
    [entry] = running.entries("inbox")
    (entry / "begun.json").write_text('{"times": 10}')
    with gateway() as running:
        wait_until(running.dead)
        assert running.dead()[0]["reason"] == "the process ended 10 times while it explained the object"


@pytest.mark.slow
def test_interrupted_objects_are_explained_alone(
    gateway: OpenGateway, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ended while it explained two objects. The next start explains each of them alone."""
    images = [image(number) for number in range(4)]
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, *images) == [0] * 4
    by_age = sorted(running.entries("inbox"), key=lambda entry: (entry / "source.dcm").stat().st_mtime)
    suspects = {entry.name for entry in by_age[:2]}
    for name in suspects:
        (running.spool / "inbox" / name / "begun.json").write_text('{"times": 1}')
    running_now, together = set[str](), threading.Barrier(2)

    def observed(client: Any, source: Path, **arguments: Any) -> Any:
        running_now.add(source.parent.name)
        try:
            if source.parent.name in suspects:
                time.sleep(0.1)  # time for another worker to begin by mistake
                assert len(running_now) == 1
            else:
                together.wait(LIMIT_S)
            return explain(client, source, **arguments)
        finally:
            running_now.discard(source.parent.name)

    monkeypatch.setattr(steps, "explain", observed)
    with gateway() as running:
        wait_until(running.idle)
        assert running.dead() == []
    assert len(pacs.objects_by_uid) == 4


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["audit.jsonl", "sent"])
def test_stored_result_is_not_stored_again_after_a_write_error(
    gateway: OpenGateway, pacs: Pacs, broken: str, log: LogLines
) -> None:
    """The audit trail or the folder sent/ cannot be written when the PACS has stored the first result."""
    with gateway(rules=[{**RULE, "outputs": ["sc", "sr"]}]) as running:
        trail, blocked = running.spool / "audit.jsonl", list[Path]()

        def block(dataset: Any) -> None:
            if blocked:
                return
            if broken == "sent":
                blocked.append(running.entries("outbox")[0] / broken)
                blocked[0].write_text("")
            else:
                blocked.append(trail.rename(running.spool / "full"))
                trail.mkdir()

        pacs.before = block
        assert send(running.address, image()) == [0]
        wait_until(lambda: len(temporary_failures(log)) > 1)
        if broken == "sent":
            blocked[0].unlink()
        else:
            trail.rmdir()
            blocked[0].rename(trail)
        wait_until(running.idle)
        assert len(pacs.stores) == len(pacs.objects_by_uid) == 2
        assert running.events().count("stored") == 2


@pytest.mark.slow
def test_interrupted_deletion_is_recorded_once(gateway: OpenGateway) -> None:
    """The process was killed after it wrote the audit trail, and before it deleted the entry."""
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image()) == [0]
    [entry] = running.entries("inbox")
    entry = entry.rename(running.spool / "dead" / entry.name)
    (entry / "reason.json").write_text('{"stage": "inbox", "reason": "none"}')
    os.utime(entry / "reason.json", (0, 0))
    with (running.spool / "audit.jsonl").open("a") as trail:
        trail.write(json.dumps({"time": "then", "event": "deleted", "object": entry.name}) + "\n")
    with gateway() as running:
        assert running.entries("dead") == []
        assert running.events() == ["received", "deleted"]


@pytest.mark.slow
def test_retention(gateway: OpenGateway) -> None:
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
    old, young = running.entries("inbox")
    os.utime(old / "source.dcm", (0, 0))
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert running.entries("inbox") == [young]
        [dead] = running.entries("dead")
        assert dead.name == old.name
        os.utime(dead / "reason.json", (0, 0))
    with gateway(rules=[{"ignore": True}]) as running:
        assert running.entries("dead") == []
        assert "deleted" in running.events()
        wait_until(running.idle)  # no rule matches the remaining object
