"""The gateway from one end to the other: a modality, a camserve server and a PACS that are real, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
from pydicom.uid import BasicTextSRStorage

from camserve.dicom.gateway import steps, work
from camserve.dicom.gateway.config import Config, ConfigError
from camserve.dicom.gateway.process import Gateway
from camserve.errors import InternalError
from camserve_server.service.server import Server
from tests.dicom.gateways import RULE, Spooled, opened
from tests.dicom.pacs import NAME, Pacs, free_port, image, listening, send, until

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


class Opened(Protocol):
    def __call__(self, **given: Any) -> AbstractContextManager[Spooled]: ...


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with listening() as pacs:
        yield pacs


@pytest.fixture
def gateway(tmp_path: Path, tiny: Server, pacs: Pacs) -> Opened:
    """Opens a gateway between the server and the PACS."""
    return lambda **given: opened(config(tmp_path, tiny, pacs, **given))


def config(tmp_path: Path, tiny: Server, there: Pacs, **given: Any) -> Config:
    there.gateway = f"127.0.0.1:{free_port()}"
    defaults = {
        "spool": tmp_path / "spool",
        "listen": there.gateway,
        "monitor_listen": "127.0.0.1:0",
        "callers": ["MODALITY"],
        "min_free_bytes": 0,
        "grace_s": 5,
        "server": {"address": tiny.address},
        "rules": [RULE],
    }
    pacs = {"ae_title": "PACS", "address": there.address} | given.pop("pacs", {})
    return Config(**defaults | {"pacs": pacs} | given)


def asked(running: Spooled, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{running.monitor}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


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


def test_strangers_are_turned_away(gateway: Opened) -> None:
    with gateway() as running:
        assert send(running.address, image(), calling="STRANGER") == []
        assert send(running.address, image(), called="OTHER") == []
        assert send(running.address, image(), calling="PACS") == [0x0124], "it may only say what it has committed"
        assert running.idle()


def test_a_full_disk_or_queue_refuses_for_now(gateway: Opened) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with gateway(max_waiting=1, server={"address": nobody, "timeout_s": 0.3}) as running:
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


def test_the_same_object_twice_is_one(gateway: Opened, pacs: Pacs) -> None:
    with gateway(server={"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}) as running:
        assert send(running.address, image(), image()) == [0, 0]
        assert len(running.entries("inbox")) == 1
    with gateway() as running:
        until(lambda: "committed" in running.events())
        assert send(running.address, image()) == [0], "it is explained anew, to the same object"
        until(lambda: running.events().count("committed") == 2)
    assert len(pacs.kept) == 1


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_pacs_that_is_down_for_a_while(gateway: Opened, pacs: Pacs) -> None:
    pacs.down()
    with gateway() as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
        until(lambda: len(running.entries("outbox")) == 2)
        pacs.up()
        until(lambda: running.events().count("committed") == 2)
        assert len(pacs.kept) == 2
        assert running.dead() == []


def test_what_the_pacs_answers(gateway: Opened, pacs: Pacs) -> None:
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


def test_what_the_pacs_lacks_is_not_forgotten_by_a_kill(gateway: Opened, pacs: Pacs) -> None:
    """The process was killed when it had taken back what the PACS did not commit itself to, but not moved it on."""
    pacs.commits = "never"
    with gateway() as running:
        assert send(running.address, image()) == [0]
        until(lambda: pacs.asked)
    [entry] = running.entries("stored")
    [sent] = (entry / "sent").iterdir()
    sent.rename(entry / "results" / sent.name)
    pacs.commits = "same"
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
    monkeypatch.setattr(work, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(work, "LONGEST_WAIT_S", 0.1)
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


def test_no_new_results_where_there_is_hardly_room_for_old_ones(gateway: Opened, pacs: Pacs) -> None:
    with gateway(server={"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}) as running:
        assert send(running.address, image()) == [0]
    with gateway(min_free_bytes=1 << 60) as running:
        time.sleep(1)
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
        assert running.dead()[0]["reason"] == "the PACS did not commit itself 3 times"
        assert running.events().count("stored") == len(pacs.stores) == 3
        assert [line["reasons"] for line in running.audit() if line["event"] == "not committed"] == [["0x0112"]] * 3


def test_a_commitment_that_is_not_answered_is_asked_for_again(gateway: Opened, pacs: Pacs) -> None:
    pacs.commits = "never"
    with gateway(pacs={"commitment_timeout_s": 0.5}) as running:
        assert send(running.address, image()) == [0]
        until(lambda: len(pacs.asked) == 2)
        assert len(set(pacs.asked)) == 2
        assert len(pacs.stores) == 1
        pacs.commits = "same"
        until(lambda: "committed" in running.events())


def test_an_archive_may_answer_what_was_asked_first(gateway: Opened, pacs: Pacs) -> None:
    pacs.commits = "later"
    with gateway(pacs={"commitment_timeout_s": 0.5}) as running:
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
    nobody = {"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}
    with gateway(server=nobody) as running:
        assert send(running.address, image()) == [0]
    [entry] = running.entries("inbox")
    (entry / "begun.json").write_text('{"times": 10}')
    with gateway() as running:
        until(running.dead)
        assert running.dead()[0]["reason"] == "it was begun 10 times and never ended"


def test_nothing_is_kept_for_ever(gateway: Opened) -> None:
    with gateway(server={"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}) as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
    old, young = running.entries("inbox")
    os.utime(old / "source.dcm", (0, 0))
    with gateway(server={"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}) as running:
        assert running.entries("inbox") == [young]
        [dead] = running.entries("dead")
        assert dead.name == old.name
        os.utime(dead / "reason.json", (0, 0))
    with gateway(rules=[{"ignore": True}]) as running:
        assert running.entries("dead") == []
        assert "deleted" in running.events()
        until(running.idle)  # its rule is gone


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


def test_only_the_owner_looks_into_the_spool(gateway: Opened, tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    with gateway(server={"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}) as running:
        assert send(running.address, image()) == [0]
        found = [running.spool, *running.spool.rglob("*")]
        assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}
        assert {path.stat().st_mode & 0o077 for path in found if path.is_file()} == {0}
        with pytest.raises(ConfigError, match="spool: another gateway"):
            Gateway(config(tmp_path, tiny, pacs))
    running.spool.chmod(0o750)
    with pytest.raises(ConfigError, match="spool: others can look"):
        Gateway(config(tmp_path, tiny, pacs))
    shutil.rmtree(running.spool)
    running.spool.write_text("")
    with pytest.raises(ConfigError, match="spool: "):
        Gateway(config(tmp_path, tiny, pacs))
