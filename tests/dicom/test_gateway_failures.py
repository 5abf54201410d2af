"""What goes wrong with an object on its way through the gateway, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from camserve.errors import InternalError
from camserve_dicom.gateway import pacs as archive
from camserve_dicom.gateway import steps, workers
from tests.dicom.gateways import RULE, Opened, nobody
from tests.dicom.pacs import Pacs, image, send, until

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


def put_off(log: list[MutableMapping[str, Any]]) -> list[str]:
    """Return the reasons of temporary failures."""
    return [line["reason"] for line in log if line["event"] == "later"]


def test_a_pacs_that_is_down_for_a_while(gateway: Opened, pacs: Pacs) -> None:
    pacs.down()
    with gateway() as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
        until(lambda: len(running.entries("outbox")) == 2)
        pacs.up()
        until(lambda: running.events().count("committed") == 2)
        assert len(pacs.kept) == 2
        assert running.dead() == []


def test_what_the_pacs_answers(gateway: Opened, pacs: Pacs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL_INTERVAL_S", 0.1)
    answers = iter([0xA701, 0xB000])
    pacs.before = lambda dataset: next(answers, None)
    with gateway() as running:
        assert send(running.address, image(0)) == [0]
        until(lambda: "committed" in running.events())
        assert [line["status"] for line in running.audit() if line["event"] == "stored"] == ["0xb000"]
        pacs.before = lambda dataset: 0xC123
        assert send(running.address, image(1)) == [0]
        until(running.dead)
        assert [(each["stage"], each["reason"]) for each in running.dead()] == [("outbox", "status 0xc123")]
        # Moved back by hand, it is tried again.
        pacs.before = lambda dataset: 0x0111
        [dead] = running.entries("dead")
        dead.rename(running.spool / "outbox" / dead.name)
        until(lambda: len(pacs.asked) == 2, 20)


def test_a_pacs_that_knows_the_gateway_not(gateway: Opened, pacs: Pacs) -> None:
    pacs.only("SOMEBODY")
    with gateway() as running:
        assert send(running.address, image()) == [0]
        until(running.dead)
        assert "rejects the association" in running.dead()[0]["reason"]


def test_a_pacs_that_hangs_up_between_two_objects(gateway: Opened, pacs: Pacs) -> None:
    pacs.hangs_up = True
    with gateway(rules=[{**RULE, "outputs": ["sc", "sr"]}]) as running:
        assert send(running.address, image()) == [0]
        until(running.idle)
        assert len(pacs.kept) == 2
        assert running.dead() == []


@pytest.mark.usefixtures("no_answers_in_the_same")
def test_what_the_pacs_lacks_is_not_forgotten_by_a_kill(gateway: Opened, pacs: Pacs) -> None:
    """The process was killed when it had taken back what the PACS did not commit itself to, but not moved it on."""
    pacs.commits = "never"
    with gateway() as running:
        assert send(running.address, image()) == [0]
        until(lambda: pacs.asked)
    [entry] = running.entries("stored")
    [sent] = (entry / "sent").iterdir()
    sent.rename(entry / "results" / sent.name)
    pacs.commits = "anew"
    with gateway() as running:
        until(running.idle)
        assert len(pacs.stores) == 2
        assert running.events()[-1] == "committed"


def test_a_fault_of_the_server_passes_or_is_given_up(
    gateway: Opened, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain, times = steps.explain, 0

    def faulty(*given: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        if times <= faults:
            raise InternalError("a fault")
        return explain(*given, **options)

    monkeypatch.setattr(steps, "explain", faulty)
    monkeypatch.setattr(workers, "MAX_RETRY_S", 0.02)
    faults = 3
    with gateway() as running:
        assert send(running.address, image()) == [0]
        until(running.idle)
        assert len(pacs.kept) == 1
        faults, times = 99, 0
        assert send(running.address, image(1)) == [0]
        until(running.dead)
        assert (running.dead()[0]["reason"], times) == ("InternalError", 10)


def test_nobody_fills_the_memory_by_a_single_message(gateway: Opened) -> None:
    with gateway() as running, socket.create_connection(parsed(running.address), timeout=10) as peer:
        peer.sendall(struct.pack(">BBL", 1, 0, 1 << 31) + bytes(4096))
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1) == b"", "the gateway hangs up before it has read it"


def parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def test_no_new_results_where_there_is_hardly_room_for_old_ones(
    gateway: Opened, pacs: Pacs, log: list[MutableMapping[str, Any]]
) -> None:
    with gateway(server=nobody()) as running:
        assert send(running.address, image()) == [0]
    with gateway(min_free_bytes=1 << 60) as running:
        until(lambda: "the disk is full" in put_off(log))
        assert len(running.entries("inbox")) == 1
        assert "explained" not in running.events()
    with gateway() as running:
        until(running.idle)
        assert len(pacs.kept) == 1


def test_no_commitment_no_end(gateway: Opened, pacs: Pacs) -> None:
    """Results that the PACS has not after all are stored again, and given up in the end."""
    pacs.commits = "failed"
    with gateway() as running:
        assert send(running.address, image()) == [0]
        until(running.dead, 60)
        assert running.dead()[0]["reason"] == "the PACS reported a failed commitment 3 times"
        assert running.events().count("stored") == len(pacs.stores) == 3
        assert [line["reasons"] for line in running.audit() if line["event"] == "not committed"] == [["0x0112"]] * 3


@pytest.mark.usefixtures("no_answers_in_the_same")
@pytest.mark.parametrize("commits", ["never", "stuck"])
def test_a_commitment_that_is_not_answered_is_asked_for_again(
    gateway: Opened, pacs: Pacs, commits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "RELEASE_TIMEOUT_S", 0.2)
    pacs.commits = commits
    with gateway(pacs={"commitment_timeout_s": 0.2}) as running:
        assert send(running.address, image()) == [0]
        until(lambda: len(pacs.asked) == 2)
        assert len(set(pacs.asked)) == 2
        assert len(pacs.stores) == 1
        pacs.commits = "anew"
        until(lambda: "committed" in running.events())


@pytest.mark.usefixtures("no_answers_in_the_same")
def test_an_archive_may_answer_what_was_asked_first(gateway: Opened, pacs: Pacs) -> None:
    pacs.commits = "later"
    with gateway(pacs={"commitment_timeout_s": 0.2}) as running:
        pacs.gateway = running.address
        assert send(running.address, image()) == [0]
        until(lambda: len(pacs.asked) == 2)
        pacs.answer_now(pacs.asked[0])
        until(lambda: "committed" in running.events())
        until(running.idle)


def test_what_cannot_be_explained_is_given_up_with_the_reason(gateway: Opened, pacs: Pacs) -> None:
    with gateway() as running:
        assert send(running.address, image(0, BurnedInAnnotation="YES"), image(1)) == [0, 0]
        until(lambda: running.dead() and "committed" in running.events())
        [why] = running.dead()
        assert (why["stage"], why["reason"]) == ("inbox", "BURNED_IN_ANNOTATION")
        assert len(pacs.kept) == 1, "others are explained"


def test_what_ends_the_process_does_not_do_so_for_ever(gateway: Opened, tmp_path: Path) -> None:
    with gateway(server=nobody()) as running:
        assert send(running.address, image()) == [0]
    [entry] = running.entries("inbox")
    (entry / "begun.json").write_text('{"times": 10}')
    with gateway() as running:
        until(running.dead)
        assert running.dead()[0]["reason"] == "the process ended 10 times while it explained the object"


def test_what_may_end_the_process_is_explained_alone(
    gateway: Opened, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ended while it explained two: the next start tells by whose fault."""
    images = [image(number) for number in range(4)]
    with gateway(server=nobody()) as running:
        assert send(running.address, *images) == [0] * 4
    by_age = sorted(running.entries("inbox"), key=lambda entry: (entry / "source.dcm").stat().st_mtime)
    suspects = {entry.name for entry in by_age[:2]}
    for name in suspects:
        (running.spool / "inbox" / name / "begun.json").write_text('{"times": 1}')
    explain, now, together = steps.explain, set[str](), threading.Barrier(2)

    def watched(client: Any, source: Path, **asked: Any) -> Any:
        now.add(source.parent.name)
        try:
            if source.parent.name in suspects:
                time.sleep(0.1)
                assert len(now) == 1
            else:
                together.wait(20)
            return explain(client, source, **asked)
        finally:
            now.discard(source.parent.name)

    monkeypatch.setattr(steps, "explain", watched)
    with gateway() as running:
        until(running.idle)
        assert running.dead() == []
    assert len(pacs.kept) == 4


@pytest.mark.parametrize("broken", ["audit.jsonl", "sent"])
def test_what_the_pacs_has_taken_is_stored_once(
    gateway: Opened, pacs: Pacs, broken: str, log: list[MutableMapping[str, Any]]
) -> None:
    """Though nothing can be written then: neither the audit trail, nor a folder."""
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
        until(lambda: len(put_off(log)) > 1)
        if broken == "sent":
            blocked[0].unlink()
        else:
            trail.rmdir()
            blocked[0].rename(trail)
        until(running.idle)
        assert len(pacs.stores) == len(pacs.kept) == 2
        assert running.events().count("stored") == 2


def test_what_is_deleted_is_said_once(gateway: Opened) -> None:
    """Though the process was killed between the two."""
    with gateway(server=nobody()) as running:
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


def test_nothing_is_kept_for_ever(gateway: Opened) -> None:
    with gateway(server=nobody()) as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
    old, young = running.entries("inbox")
    os.utime(old / "source.dcm", (0, 0))
    with gateway(server=nobody()) as running:
        assert running.entries("inbox") == [young]
        [dead] = running.entries("dead")
        assert dead.name == old.name
        os.utime(dead / "reason.json", (0, 0))
    with gateway(rules=[{"ignore": True}]) as running:
        assert running.entries("dead") == []
        assert "deleted" in running.events()
        until(running.idle)  # its rule is gone
