"""Parts of the gateway by themselves: how long it waits, and what it says."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from camserve_dicom.gateway import workers
from camserve_dicom.gateway.audit import Audit


def test_waits_grow_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it has failed: a PACS may be away for weeks."""
    monkeypatch.setattr(workers, "FIRST_RETRY_S", 1.0)
    waits = [workers.retry_delay_s(tried) for tried in (0, 1, 2, 8, 9, 1023, 1024, 10**6)]
    assert waits == [1.0, 2.0, 4.0, 256.0, 300.0, 300.0, 300.0, 300.0]


def test_a_line_is_whole_or_not_there(tmp_path: Path) -> None:
    """Where the disk takes a part of it, the next line begins on its own."""
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


def test_a_step_that_was_cut_short_is_said_once(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", CollectorRegistry())
    for result in ("x", "x", "y", "x"):
        audit.write_once("stored", object="a", result=result)
        audit.write_once("stored", object="b", result=result)
    lines = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert [line["result"] for line in lines if line["object"] == "a"] == ["x", "y", "x"]
