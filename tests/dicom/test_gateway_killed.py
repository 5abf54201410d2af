"""The gateway as a process that is killed, whatever it is doing, and started again: nothing is lost or double."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path

import pytest
from pydicom import Dataset

from camserve_server.service.server import Server
from tests.dicom.gateways import process
from tests.dicom.pacs import NAME, Pacs, free_port, image, send, until

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]

CONFIG = """
spool = "spool"
listen = "{listen}"
callers = ["MODALITY"]
min_free_bytes = 0

[server]
address = "{server}"

[pacs]
ae_title = "PACS"
address = "{pacs}"
commitment_timeout_s = {commitment_timeout_s}

[[rules]]
model = "tiny"
method = "{method}"
parameters = {parameters}
outputs = ["sc", "sr"]
check = "insertion>=0"
"""
KINDS = {"OT", "SR"}


def written(
    folder: Path,
    server: str,
    pacs: Pacs,
    method: str = "grad-cam",
    parameters: str = "{}",
    commitment_timeout_s: float = 3600,
) -> Path:
    pacs.gateway = f"127.0.0.1:{free_port()}"
    given = {"listen": pacs.gateway, "server": server, "pacs": pacs.address}
    path = folder / "gateway.toml"
    path.write_text(
        CONFIG.format(**given, method=method, parameters=parameters, commitment_timeout_s=commitment_timeout_s)
    )
    return path


def sources(pacs: Pacs, kind: str) -> list[str]:
    """Of the results of that modality, sorted."""
    found = [each for each in pacs.objects() if each.Modality == kind]
    return sorted(map(_source, found))


def _source(result: Dataset) -> str:
    if "SourceImageSequence" in result:
        return str(result.SourceImageSequence[0].ReferencedSOPInstanceUID)
    [study] = result.CurrentRequestedProcedureEvidenceSequence
    return str(study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)


def test_while_it_explains(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    config, spool = written(tmp_path, tiny.address, pacs, "opti-cam", "{steps = 10000}"), tmp_path / "spool"
    with process(config, spool) as (running, seen):
        assert send(seen.address, image()) == [0]
        until(lambda: [*seen.entries("inbox")[0].glob("begun.json")])
        running.kill()
    with process(written(tmp_path, tiny.address, pacs), spool) as (_, seen):
        until(lambda: "committed" in seen.events() and seen.idle(), 60)
    assert {kind: sources(pacs, kind) for kind in KINDS} == {kind: [image().SOPInstanceUID] for kind in KINDS}
    assert seen.events().count("received") == 1


def test_while_results_wait_to_be_stored(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    pacs.down()
    config, spool = written(tmp_path, tiny.address, pacs), tmp_path / "spool"
    with process(config, spool) as (running, seen):
        assert send(seen.address, image()) == [0]
        until(lambda: seen.entries("outbox"), 60)
        running.kill()
    pacs.up()
    with process(config, spool) as (_, seen):
        until(lambda: "committed" in seen.events() and seen.idle(), 60)
    assert seen.events().count("explained") == 1
    assert len(pacs.stores) == len(pacs.kept) == 2


def test_while_the_pacs_takes_a_result(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    """What it had taken without the gateway's knowing is stored again, as the same object."""
    came, go = threading.Event(), threading.Event()

    def wait(dataset: Dataset) -> None:
        came.set()
        go.wait(60)

    pacs.before = wait
    config, spool = written(tmp_path, tiny.address, pacs), tmp_path / "spool"
    with process(config, spool) as (running, seen):
        assert send(seen.address, image()) == [0]
        assert came.wait(60)
        running.kill()
        running.wait()
        go.set()
        until(lambda: pacs.stores)
        [first] = pacs.kept.values()
    pacs.before = lambda dataset: None
    with process(config, spool) as (_, seen):
        until(lambda: "committed" in seen.events() and seen.idle(), 60)
    assert seen.events().count("explained") == 1
    assert (len(pacs.stores), len(pacs.kept)) == (3, 2)
    assert first in pacs.kept.values(), "the same bytes"


@pytest.mark.parametrize("timeout_s", [3600, 0.5])
def test_while_the_commitment_is_awaited(tmp_path: Path, tiny: Server, pacs: Pacs, timeout_s: float) -> None:
    """The answer to what was asked for before it was killed counts; without one it asks again."""
    pacs.commits = "later"
    config = written(tmp_path, tiny.address, pacs, commitment_timeout_s=timeout_s)
    spool = tmp_path / "spool"
    with process(config, spool) as (running, seen):
        assert send(seen.address, image()) == [0]
        until(lambda: pacs.asked, 60)
        running.kill()
    with process(config, spool) as (_, seen):
        assert [entry.parent.name for entry in seen.entries("stored")] == ["stored"]
        if timeout_s == 3600:
            pacs.answer_now()
        else:
            pacs.commits = "same"
        until(lambda: "committed" in seen.events() and seen.idle(), 60)
    assert (len(pacs.asked) > 1) == (timeout_s != 3600)
    assert len(pacs.stores) == len(pacs.kept) == 2


@pytest.mark.slow
def test_at_any_moment(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    """Killed four times at moments of chance while a modality sends, which tries again what it has no answer to."""
    images = [image(number) for number in range(8)]
    config, spool = written(tmp_path, tiny.address, pacs, commitment_timeout_s=0.5), tmp_path / "spool"
    chance, left = random.Random(7), [*images]

    def modality() -> None:
        while left:
            statuses = send(pacs.gateway, left[0])
            if statuses == [0]:
                left.pop(0)
            time.sleep(0.05)

    sender = threading.Thread(target=modality, daemon=True)
    sender.start()
    for _ in range(4):
        with process(config, spool) as (running, _):
            time.sleep(chance.uniform(0.05, 1.2))
            running.send_signal(signal.SIGKILL)
    with process(config, spool) as (running, seen):
        sender.join(60)
        assert not left
        until(seen.idle, 90)
        running.terminate()
        assert running.wait(30) == 0
    expected = sorted(str(each.SOPInstanceUID) for each in images)
    assert {kind: sources(pacs, kind) for kind in KINDS} == dict.fromkeys(KINDS, expected)
    assert seen.dead() == []
    log = config.with_suffix(".log").read_text()
    assert '"event": "committed"' in log
    for said in (NAME, "Q-4711", "1.2.826", "2.25.", "19470229", "20240203", str(tmp_path)):
        assert said not in log
