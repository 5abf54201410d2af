"""The gateway as a process that is killed and started again: no object is lost, and no result is stored as another."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread

from camserve_server.service.server import Server
from tests.dicom import gateways
from tests.dicom.gateways import command, forked
from tests.dicom.pacs import NAME, Pacs, image, send, wait_until
from tests.dicom.receivers import Webhook, webhook
from tests.dicom.samples import stored
from tests.dicom.test_gateway_studies import predecessors, reports, selections
from tests.dicom.test_study_report import references
from tests.processes import LIMIT_S, overloaded_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]

CONFIG = """
commitment_timeout_s = {commitment_timeout_s}

[study]
{study}

[[flags]]
min_probability = 0.0

[[rules]]
model = "tiny"
method = "{method}"
parameters = {parameters}
metrics = ["insertion"]
outputs = ["sc", "sr", "pdf"]
check = "insertion>=0"
"""
KINDS = {"OT", "SR", "DOC"}


def write_config(
    folder: Path,
    server: str,
    pacs: Pacs,
    method: str = "grad-cam",
    parameters: str = "{}",
    commitment_timeout_s: float = 3600,
    study: str = "quiet_s = 3600",
    hook: str | None = None,
) -> Path:
    """Write the configuration of a gateway that reports studies, and perhaps notifies a webhook."""
    text = CONFIG.format(method=method, parameters=parameters, commitment_timeout_s=commitment_timeout_s, study=study)
    notification = f'[[notifications]]\nname = "ris"\nurl = "{hook}"\n' if hook else ""
    return gateways.write_config(folder, server, pacs, text + notification)


@pytest.fixture
def hook() -> Iterator[Webhook]:
    """Run a webhook."""
    with webhook() as running:
        yield running


def sources(pacs: Pacs, modality: str) -> list[str]:
    """Return the SOP Instance UIDs of the sources of all results of images with this modality, sorted."""
    of_images = [each for each in pacs.objects() if each.SeriesNumber < 9008]
    return sorted(source(each) for each in of_images if each.Modality == modality)


def source(result: Dataset) -> str:
    """Return the SOP Instance UID of the source of a result."""
    for name in ("SourceImageSequence", "SourceInstanceSequence"):
        if name in result:
            return str(result[name].value[0].ReferencedSOPInstanceUID)
    [study] = result.CurrentRequestedProcedureEvidenceSequence
    return str(study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)


def test_kill_during_explanation(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    path, spool = write_config(tmp_path, tiny.address, pacs, "opti-cam", "{steps = 10000}"), tmp_path / "spool"
    with forked(path, spool) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: [*running.entries("inbox")[0].glob("begun.json")])
        running.kill()
        running.wait()
    with forked(write_config(tmp_path, tiny.address, pacs), spool) as running:
        wait_until(lambda: "committed" in running.events() and running.idle())
    assert {kind: sources(pacs, kind) for kind in KINDS} == {kind: [image().SOPInstanceUID] for kind in KINDS}
    assert running.events().count("received") == 1


def test_kill_of_the_command_before_storage(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    """The other tests fork the gateway; this one runs `camserve dicom gateway`."""
    pacs.down()
    path, spool = write_config(tmp_path, tiny.address, pacs), tmp_path / "spool"
    with command(path, spool) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: running.entries("outbox"))
        running.kill()
        running.wait()
    pacs.up()
    with forked(path, spool) as running:
        wait_until(lambda: "committed" in running.events() and running.idle())
    assert running.events().count("explained") == 1
    assert len(pacs.stores) == len(pacs.objects_by_uid) == 3


def test_kill_during_storage(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    """A result that the PACS stored without the gateway's knowledge is stored again as the same object."""
    received, killed = threading.Event(), threading.Event()

    def wait_for_kill(dataset: Dataset) -> None:
        received.set()
        killed.wait(LIMIT_S)

    pacs.before = wait_for_kill
    path, spool = write_config(tmp_path, tiny.address, pacs), tmp_path / "spool"
    with forked(path, spool) as running:
        assert send(running.address, image()) == [0]
        assert received.wait(LIMIT_S)
        running.kill()
        running.wait()
        killed.set()
        wait_until(lambda: pacs.objects_by_uid)
        [first] = pacs.objects_by_uid.values()
    pacs.before = lambda dataset: None
    with forked(path, spool) as running:
        wait_until(lambda: "committed" in running.events() and running.idle())
    assert running.events().count("explained") == 1
    assert (len(pacs.stores), len(pacs.objects_by_uid)) == (4, 3)
    assert first in pacs.objects_by_uid.values()


@pytest.mark.parametrize("timeout_s", [3600, 0.5])
def test_kill_before_commitment_report(tmp_path: Path, tiny: Server, pacs: Pacs, timeout_s: float) -> None:
    """A report on the request of the killed process is accepted. Without a report the request is repeated."""
    pacs.commits = "later"
    path = write_config(tmp_path, tiny.address, pacs, commitment_timeout_s=timeout_s)
    spool = tmp_path / "spool"
    with forked(path, spool) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: pacs.requests)
        running.kill()
        running.wait()
    with forked(path, spool) as running:
        assert len(running.entries("stored")) == 1
        if timeout_s == 3600:
            pacs.report_now(pacs.requests[0])
        else:
            pacs.commits = "same"
        wait_until(lambda: "committed" in running.events() and running.idle())
    if timeout_s != 3600:
        assert len(pacs.requests) > 1
    assert len(pacs.stores) == len(pacs.objects_by_uid) == 3


def test_commitment_report_while_the_gateway_is_down(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    """The next process requests the commitment at its start, and not after `commitment_timeout_s`."""
    pacs.commits = "later"
    path, spool = write_config(tmp_path, tiny.address, pacs), tmp_path / "spool"
    with forked(path, spool) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: pacs.requests)
        running.kill()
        running.wait()
    pacs.commits = "same"
    with forked(path, spool) as running:
        wait_until(lambda: "committed" in running.events() and running.idle())
    assert len(pacs.requests) == 2


@pytest.mark.parametrize("moment", ["before the entry", "after the entry", "after storage"])
def test_kill_while_a_study_is_reported(tmp_path: Path, tiny: Server, pacs: Pacs, moment: str) -> None:
    """The gateway is killed after it has recorded a report, and before it has recorded that the entry was added."""
    study = "quiet_s = 3600\nexpected_images = 2"  # however slowly the images arrive
    path, spool = write_config(tmp_path, tiny.address, pacs, study=study), tmp_path / "spool"
    pacs.before = lambda dataset: 0xA700 if moment != "after storage" and dataset.SeriesNumber >= 9008 else None
    with forked(path, spool) as running:
        assert send(running.address, image(0), image(1)) == [0, 0]
        wait_until(lambda: "study reported" in running.events())
        [entry] = [line["object"] for line in running.audit() if line["event"] == "study reported"]
        if moment == "after storage":
            wait_until(running.idle)
        [record] = (spool / "studies").glob("*/reports.json")
        wait_until(lambda: json.loads(record.read_text())["reports"][0]["added"])
        running.kill()
        running.wait()
    record.write_text(json.dumps({"reports": [json.loads(record.read_text())["reports"][0] | {"added": False}]}))
    if moment == "before the entry":
        shutil.rmtree(spool / "outbox" / entry)
    pacs.before = lambda dataset: None
    with forked(path, spool) as running:
        wait_until(lambda: json.loads(record.read_text())["reports"][0]["added"] and running.idle())
    [report], [selection] = reports(pacs), selections(pacs)
    assert len(references(report)) == 2 + 2 * len(KINDS)
    assert len(references(selection)) == 2
    assert len(pacs.objects_by_uid) == 2 * len(KINDS) + 2


def test_kill_while_the_webhook_responds(tmp_path: Path, tiny: Server, pacs: Pacs, hook: Webhook) -> None:
    """A message whose response is lost is sent again with the same identifier and content."""
    called, killed = threading.Event(), threading.Event()

    def wait_for_kill() -> tuple[int, dict[str, str]]:
        called.set()
        killed.wait(LIMIT_S)
        return 200, {}

    hook.status = wait_for_kill
    path, spool = write_config(tmp_path, tiny.address, pacs, hook=hook.url), tmp_path / "spool"
    with forked(path, spool) as running:
        assert send(running.address, image()) == [0]
        assert called.wait(LIMIT_S)
        running.kill()
        running.wait()
        killed.set()
    with forked(path, spool) as running:
        wait_until(lambda: "notified" in running.events() and running.idle())
    first, second = hook.requests
    assert first == second
    assert len(pacs.stores) == len(KINDS)


@pytest.mark.slow
def test_kill_at_random_times(tmp_path: Path, tiny: Server, pacs: Pacs, hook: Webhook) -> None:
    """The gateway is killed four times while a modality sends images, and sends again those without a response.

    The webhook is told about each image. It gets the same message if it is told again.
    """
    images = [image(number) for number in range(8)]
    path = write_config(tmp_path, tiny.address, pacs, commitment_timeout_s=0.5, study="quiet_s = 0.4", hook=hook.url)
    spool = tmp_path / "spool"
    rng, unsent = random.Random(7), [*images]

    def modality() -> None:
        while unsent:
            statuses = send(pacs.gateway, unsent[0])
            if statuses == [0]:
                unsent.pop(0)
            time.sleep(0.05)

    sender = threading.Thread(target=modality, daemon=True)
    sender.start()
    for _ in range(4):
        with forked(path, spool) as running:
            time.sleep(rng.uniform(0.05, 1.2))
            running.kill()
            running.wait()
    with forked(path, spool) as running:
        sender.join(LIMIT_S)
        assert not unsent
        wait_until(lambda: any(line.get("images") == len(images) for line in running.audit()) and running.idle())
        running.terminate()
        assert running.wait() == 0
    expected = sorted(str(each.SOPInstanceUID) for each in images)
    assert {kind: sources(pacs, kind) for kind in KINDS} == dict.fromkeys(KINDS, expected)
    assert running.dead() == []
    check_reports(pacs, {str(each.SOPInstanceUID) for each in images})
    messages = {json.dumps(message) for _, message in hook.requests}
    results = {each["sop_instance_uid"] for message in messages for each in json.loads(message)["results"]}
    assert results == {str(each.SOPInstanceUID) for each in pacs.objects()}
    assert len({json.loads(message)["id"] for message in messages}) == len(images) + len(reports(pacs))
    log = path.with_suffix(".log").read_text()
    assert '"event": "committed"' in log
    for secret in (NAME, "Q-4711", "1.2.826", "2.25.", "19470229", "20240203", str(tmp_path)):
        assert secret not in log


def check_reports(pacs: Pacs, images: set[str]) -> None:
    """Check that each report of the study names the one before it, and that the last one has all results."""
    made = {str(each.SOPInstanceUID): each for each in reports(pacs)}
    [last] = made.keys() - {uid for each in made.values() for uid in predecessors(each)}
    results = {str(each.SOPInstanceUID) for each in pacs.objects() if each.SeriesNumber < 9008}
    assert references(made[last]) == results | images
    chain = [last]
    while earlier := predecessors(made[chain[-1]]):
        assert references(made[earlier[0]]) < references(made[chain[-1]])
        chain += earlier
    assert sorted(chain) == sorted(made)
    assert references(selections(pacs)[-1]) == images


def test_log_has_only_json(tmp_path: Path, pacs: Pacs) -> None:
    """Texts of gRPC and of decoders do not appear in the log."""
    corrupt = dcmread(stored("JPGLosslessP14SV1_1s_1f_8b.dcm"))
    del corrupt.SequenceOfUltrasoundRegions
    half = len(corrupt.PixelData) // 2
    corrupt.PixelData = corrupt.PixelData[:half] + b"\xff\xa4" * 200 + corrupt.PixelData[half + 400 :]
    with overloaded_server() as address:
        path = write_config(tmp_path, address, pacs)
        with forked(path, tmp_path / "spool") as running:
            assert send(pacs.gateway, image(), corrupt) == [0, 0]
            log = path.with_suffix(".log")
            wait_until(lambda: running.dead() and "step will be retried" in log.read_text())
            running.terminate()
            assert running.wait() == 0
    assert [each["reason"] for each in running.dead()] == ["UNREADABLE_PIXELS"]
    for line in log.read_text().splitlines():
        assert "event" in json.loads(line), line
    assert "too_many_pings" not in log.read_text()
