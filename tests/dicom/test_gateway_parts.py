"""Retry delays and the audit trail of the gateway."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from camserve_dicom.gateway import workers
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.process import Gateway
from camserve_dicom.gateway.spool import Spool, Stage, write_file


def test_retry_delay_doubles_up_to_a_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay is valid for any number of failures, because a PACS may be down for weeks."""
    monkeypatch.setattr(workers, "FIRST_RETRY_S", 1.0)
    delays = [workers.retry_delay_s(failures) for failures in (0, 1, 2, 8, 9, 1023, 1024, 10**6)]
    assert delays == [1.0, 2.0, 4.0, 256.0, 300.0, 300.0, 300.0, 300.0]


def test_audit_line_is_complete_or_missing(tmp_path: Path) -> None:
    """After a partial write, the next line begins on a line of its own."""
    audit = Audit(tmp_path / "audit.jsonl", CollectorRegistry())
    audit.write("received", object="a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "audit.jsonl").stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            audit.write("explained", object="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    audit.write("stored", object="a")
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["received", "stored"]


def test_write_once_skips_the_last_line_of_the_object(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", CollectorRegistry())
    for result in ("x", "x", "y", "x"):
        audit.write_once("stored", object="a", result=result)
        audit.write_once("stored", object="b", result=result)
    lines = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert [line["result"] for line in lines if line["object"] == "a"] == ["x", "y", "x"]


def test_object_that_arrives_twice_at_once_is_in_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a sender's object is written, the same object of another sender arrives and moves on."""
    spool = Spool(tmp_path / "spool")
    temporary_path = spool._temporary_path

    def temporary_path_after_another(name: str) -> Path:
        monkeypatch.setattr(spool, "_temporary_path", temporary_path)
        assert spool.add(name, {"source.dcm": b"first"})
        spool.move(spool.folder(Stage.inbox) / name, Stage.outbox)
        return temporary_path(name)

    monkeypatch.setattr(spool, "_temporary_path", temporary_path_after_another)
    assert not spool.add("x", {"source.dcm": b"second"})
    assert spool.entries(Stage.inbox) == []
    assert (spool.folder(Stage.outbox) / "x" / "source.dcm").read_bytes() == b"first"
    assert [*(spool.root / "incoming").iterdir()] == []
    spool.close()


def test_entry_that_has_moved_is_not_created_again(tmp_path: Path) -> None:
    """An entry without an image would count as its object in progress, so that the object is never explained."""
    spool, audit = Spool(tmp_path / "spool"), Audit(tmp_path / "audit.jsonl", CollectorRegistry())
    assert spool.add("a", {"source.dcm": b"image"})
    entry = spool.folder(Stage.inbox) / "a"
    moved = spool.move(entry, Stage.outbox)
    with pytest.raises(FileNotFoundError):
        workers.move_to_dead(spool, audit, entry, "the entry is older than retention_h")
    for file in ("begun.json", "results/sc.dcm"):
        with pytest.raises(FileNotFoundError):
            write_file(entry / file, {}, new_folder="/" in file)
    assert [spool.entries(stage) for stage in (Stage.inbox, Stage.outbox, Stage.dead)] == [[], [moved], []]
    assert not (tmp_path / "audit.jsonl").exists()


def test_cleanup_goes_on_if_a_stage_cannot_be_read(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"spool": tmp_path / "spool", "callers": ["A"], "pacs": {"ae_title": "PACS", "address": "127.0.0.1:104"}}
    )
    gateway = Gateway(config)
    try:
        assert gateway._spool.add("a", {"source.dcm": b"image"}, Stage.stored)
        os.utime(gateway._spool.folder(Stage.stored) / "a" / "source.dcm", (0, 0))
        gateway._spool.folder(Stage.inbox).rename(tmp_path / "away")
        gateway.clean_up()
        assert [each.name for each in gateway._spool.entries(Stage.dead)] == ["a"]
    finally:
        gateway._client.close()
        gateway._spool.close()
