"""Retry delays and the audit trail of the gateway."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from camserve_dicom.gateway import workers
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.spool import Spool, Stage


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
