"""Workitems that the gateway performs, on the test server of `ups_test_server`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.performed import Reason, completed
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure
from camserve_dicom.gateway.workitems import ImageReference, Worklist
from camserve_dicom.gateway.worklist_config import WorklistConfig
from tests.dicom.conftest import LogLines
from tests.dicom.gateways import RULE, OpenGateway, Spooled, request
from tests.dicom.pacs import Pacs, image, send, wait_until
from tests.dicom.receivers import webhook
from tests.dicom.test_gateway_notifications import SECRETS
from tests.dicom.ups_test_server import UpsServer, code, ups_server, workitem

# The PACS is down in some tests.
pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*socket.socket fd:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def ups() -> Iterator[UpsServer]:
    """Run the test server."""
    with ups_server() as running:
        yield running


def table(ups: UpsServer, **keys: Any) -> dict[str, Any]:
    """Return a `[worklist]` table."""
    return {"url": ups.url, "station": "CAMSERVE1", "poll_s": 0.05} | keys


def is_over(running: Spooled, ups: UpsServer) -> bool:
    """Return True if all workitems have an outcome that the gateway has recorded."""
    states = {each.dataset.ProcedureStepState for each in ups.items.values()}
    return states <= {"COMPLETED", "CANCELED"} and running.idle() and not running.entries("worklist")


def states(ups: UpsServer) -> list[str]:
    """Return the states that the gateway has set, in order."""
    return [state for _, state, _ in ups.changes]


def outputs(dataset: Dataset) -> dict[str, str]:
    """Return the SOP Class UID of each output of a workitem by SOP Instance UID."""
    [performed] = dataset.UnifiedProcedureStepPerformedProcedureSequence
    items = [each.ReferencedSOPSequence[0] for each in performed.OutputInformationSequence]
    return {each.ReferencedSOPInstanceUID: each.ReferencedSOPClassUID for each in items}


def test_workitem_is_completed_with_references_to_the_results(
    gateway: OpenGateway, pacs: Pacs, ups: UpsServer, log: LogLines
) -> None:
    uid = ups.add(workitem(), image(0), image(1))
    with gateway(rules=[RULE | {"outputs": ["sc", "sr"]}], worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
    assert states(ups) == ["IN PROGRESS", "COMPLETED"]
    assert len({transaction for _, _, transaction in ups.changes}) == 1
    assert ups.refusals == []
    done = ups.items[uid].dataset
    assert outputs(done) == {each.SOPInstanceUID: each.SOPClassUID for each in pacs.objects()}
    assert len(pacs.objects()) == 4
    [performed] = done.UnifiedProcedureStepPerformedProcedureSequence
    assert performed.PerformedStationNameCodeSequence[0].CodeValue == "CAMSERVE1"
    assert performed.PerformedWorkitemCodeSequence[0].CodeValue == "SALIENCY"
    assert performed.OutputInformationSequence[0].DICOMRetrievalSequence[0].RetrieveAETitle == "PACS"
    [progress] = done.ProcedureStepProgressInformationSequence
    assert progress.ProcedureStepProgress == 100
    assert progress.ProcedureStepProgressDescription == "2 of 2 images have results, 0 are not selected"
    names = [(line["event"], line.get("peer")) for line in running.audit()]
    assert names[:2] == [("workitem claimed", None), ("received", "WORKLIST")]
    completed = running.audit()[-1]
    assert (completed["event"], completed["results"]) == ("workitem completed", 4)
    text = json.dumps([running.audit(), log], default=str)
    assert not any(secret in text for secret in SECRETS)


def test_outputs_of_a_dicomweb_pacs_have_a_retrieve_url(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"spool": tmp_path, "callers": ["A"], "pacs": {"stow_url": "https://pacs.example.org/dicom-web/studies"}}
    )
    result = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3", "SOPClassUID": "1.4", "SOPInstanceUID": "1.5"}
    done = completed(workitem(), config, "20240203101112+0000", [result], "https://pacs.example.org/dicom-web", "")
    [performed] = done.UnifiedProcedureStepPerformedProcedureSequence
    [output] = performed.OutputInformationSequence
    assert output.WADORSRetrievalSequence[0].RetrieveURL == "https://pacs.example.org/dicom-web/studies/1.2/series/1.3"
    assert performed.PerformedStationNameCodeSequence[0].CodeValue == "CAMSERVE"


@pytest.mark.parametrize(
    ("attributes", "filters"),
    [
        ({"ScheduledStationNameCodeSequence": [code("OTHER")]}, {"station": "CAMSERVE1"}),
        ({"ScheduledWorkitemCodeSequence": [code("OTHER")]}, {"workitem_code": "SALIENCY"}),
        ({"WorklistLabel": "other & more"}, {"label": "AI"}),
        ({"InputReadinessState": "INCOMPLETE"}, {}),
        ({"ProcedureStepState": "IN PROGRESS"}, {}),
    ],
)
@pytest.mark.parametrize("ignores", [False, True])
def test_other_workitems_are_not_claimed(
    gateway: OpenGateway, ups: UpsServer, attributes: dict[str, Any], filters: dict[str, str], ignores: bool
) -> None:
    """Also if the server ignores the conditions of the search."""
    if ignores:
        ups.ignores = {"ProcedureStepState", "InputReadinessState", "WorklistLabel"} | {
            f"Scheduled{name}CodeSequence.CodeValue" for name in ("StationName", "Workitem")
        }
    other = ups.add(workitem(1, **attributes), image())
    ups.add(workitem(2), image())
    with gateway(worklist=table(ups, **filters)) as running:
        wait_until(lambda: "workitem completed" in running.events())
        searches = len(ups.requests)
        wait_until(lambda: len(ups.requests) > searches + 2)
    assert {uid for uid, _, _ in ups.changes} == {workitem(2).SOPInstanceUID}
    assert ups.state(other) == attributes.get("ProcedureStepState", "SCHEDULED")


def test_urgent_workitems_are_first_and_few_are_claimed(gateway: OpenGateway, ups: UpsServer) -> None:
    for number, priority in enumerate(["LOW", "MEDIUM", "HIGH"]):
        ups.add(workitem(number, ScheduledProcedureStepPriority=priority), image(number))
    with gateway(worklist=table(ups, max_claimed=1)) as running:
        wait_until(lambda: is_over(running, ups))
    claimed = [(uid[-1], state) for uid, state, _ in ups.changes]
    assert claimed == [(each, state) for each in "210" for state in ("IN PROGRESS", "COMPLETED")]


def test_claim_of_another_performer(gateway: OpenGateway, ups: UpsServer) -> None:
    """Another performer claims the workitem between the search and the claim."""
    uid = ups.add(workitem(), image())

    def claim(method: str, target: str) -> None:
        if method == "PUT" and ups.state(uid) == "SCHEDULED":
            ups.items[uid].dataset.ProcedureStepState, ups.items[uid].transaction = "IN PROGRESS", "1.2.3"

    ups.before = claim
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: running.events() == ["workitem not claimed"] and not running.entries("worklist"))
    assert ups.state(uid) == "IN PROGRESS"
    assert [status for status, _ in ups.refusals] == [409, 409]
    assert ups.updates == []


@pytest.mark.parametrize("lost", ["IN PROGRESS", "COMPLETED"])
def test_lost_response_is_not_a_lost_workitem(gateway: OpenGateway, ups: UpsServer, lost: str) -> None:
    """The connection ends after the server has changed the state."""
    uid = ups.add(workitem(), image())
    left = [True]

    def loses(method: str, target: str) -> bool:
        return method == "PUT" and ups.state(uid) == lost and bool(left) and left.pop()

    ups.loses = loses
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
    assert states(ups) == ["IN PROGRESS", "COMPLETED"]
    assert running.events().count("workitem claimed") == running.events().count("workitem completed") == 1


@pytest.mark.parametrize("status", [401, 429, 503])
def test_unavailable_worklist_and_archive_are_retried(gateway: OpenGateway, ups: UpsServer, status: int) -> None:
    ups.add(workitem(), image())
    failed: set[tuple[str, str]] = set()

    def fail_once(method: str, target: str) -> int | None:
        key = (method, target.partition("?")[0])
        if key in failed:
            return None
        failed.add(key)
        return status

    ups.before = fail_once
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
    assert states(ups) == ["IN PROGRESS", "COMPLETED"]
    assert len(failed) == 5


def test_images_that_no_rule_selects_do_not_count(gateway: OpenGateway, pacs: Pacs, ups: UpsServer) -> None:
    uid = ups.add(workitem(), image(0), image(1, Modality="XC"))
    with gateway(rules=[RULE | {"modality": ["CR"], "callers": ["WORKLIST"]}], worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
    assert ups.state(uid) == "COMPLETED"
    assert len(pacs.objects()) == 1


def canceled(ups: UpsServer, uid: str) -> tuple[str, str]:
    """Return the code and the text of the reason of a canceled workitem."""
    assert ups.state(uid) == "CANCELED"
    [progress] = ups.items[uid].dataset.ProcedureStepProgressInformationSequence
    [reason] = progress.ProcedureStepDiscontinuationReasonCodeSequence
    return reason.CodeValue, progress.ReasonForCancellation


def test_workitem_without_selected_images_is_canceled(gateway: OpenGateway, ups: UpsServer) -> None:
    uid = ups.add(workitem(), image(0, Modality="XC"))
    with gateway(rules=[RULE | {"modality": ["CR"]}], worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
    text = "0 of 1 images have results, 1 are not selected"
    assert canceled(ups, uid) == (Reason.not_supported.value, text)
    assert running.audit()[-1]["reason"] == text


@pytest.mark.parametrize("fault", ["missing", "another image", "no DICOM", "too large", "no part"])
def test_workitem_whose_image_cannot_be_retrieved_is_canceled(
    gateway: OpenGateway, pacs: Pacs, ups: UpsServer, fault: str
) -> None:
    """The results of the other image are in the PACS, and the workitem refers to them."""
    uid = ups.add(workitem(), image(0), image(1))
    missing, other = sorted(ups.images)
    if fault == "missing":
        del ups.images[missing]
    else:
        ups.images[missing] = {
            "another image": ups.images[other],
            "no DICOM": b"nothing",
            "too large": bytes(1 << 20),
            "no part": b"",
        }[fault]
    with gateway(worklist=table(ups), max_object_bytes=100_000) as running:
        wait_until(lambda: is_over(running, ups))
    reason, text = canceled(ups, uid)
    assert reason == Reason.not_retrieved.value
    assert text.startswith("1 of 2 images have results") and "1 could not be retrieved" in text
    assert outputs(ups.items[uid].dataset).keys() == {str(each.SOPInstanceUID) for each in pacs.objects()}
    assert running.events().count("not retrieved") == 1


def test_workitem_whose_image_cannot_be_explained_is_canceled(gateway: OpenGateway, ups: UpsServer) -> None:
    uid = ups.add(workitem(), image(0, BurnedInAnnotation="YES"))
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
    assert canceled(ups, uid)[0] == Reason.failed.value
    assert running.dead()[0]["reason"] == "BURNED_IN_ANNOTATION"


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("fault", ["none", "too many", "no DICOM", "path", "no sequence"])
def test_workitem_with_unusable_input_is_canceled(gateway: OpenGateway, ups: UpsServer, fault: str) -> None:
    dataset = workitem()
    uid = ups.add(dataset, *[image(number) for number in range({"none": 0, "too many": 3}.get(fault, 1))])
    if fault == "no DICOM":
        dataset.InputInformationSequence[0].TypeOfInstances = "CDA"
    elif fault == "path":
        dataset.InputInformationSequence[0].StudyInstanceUID = "1/../../secret"
    elif fault == "no sequence":
        dataset.add_new("InputInformationSequence", "LO", "text")
    with gateway(worklist=table(ups, max_images=2)) as running:
        wait_until(lambda: is_over(running, ups))
    assert canceled(ups, uid)[0] == Reason.bad_references.value
    assert not [target for _, target in ups.requests if "/studies/" in target]


def test_other_hosts_are_never_contacted(gateway: OpenGateway, ups: UpsServer) -> None:
    """A workitem may name any URL. The image is retrieved from the configured host."""
    with ups_server() as other:
        dataset = workitem()
        ups.add(dataset, image())
        dataset.InputInformationSequence[0].WADORSRetrievalSequence[0].RetrieveURL = f"{other.url}/studies/1.2/series/1"
        with gateway(worklist=table(ups)) as running:
            wait_until(lambda: is_over(running, ups))
        assert states(ups) == ["IN PROGRESS", "COMPLETED"]
        assert other.requests == []


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://pacs.example.org/b/c/studies/1.2/series/1.3", "/b/c"),
        ("https://pacs.example.org/studies/1.2", ""),
        ("https://pacs.example.org:443/b/studies/1.2", "/b"),
        ("http://pacs.example.org/b/studies/1.2", "/a"),
        ("https://pacs.example.org:8443/b/studies/1.2", "/a"),
        ("https://pacs.example.org.evil.example/b/studies/1.2", "/a"),
        ("https://pacs.example.org@evil.example/b/studies/1.2", "/a"),
        ("https://pacs.example.org:x/b/studies/1.2", "/a"),
        ("https://pacs.example.org/b\r\nHost: x/studies/1.2", "/a"),
        ("file:///etc/studies/passwd", "/a"),
        ("", "/a"),
    ],
)
def test_retrieve_url_gives_a_path_on_the_configured_host(url: str, path: str, ups: UpsServer) -> None:
    worklist = Worklist(WorklistConfig(url=ups.url, retrieve_url="https://pacs.example.org/a/", label="AI"), 1 << 20)
    assert worklist._images_path(url) == path


def test_deflated_image_is_refused(ups: UpsServer) -> None:
    """The transfer syntax may follow other elements of the file meta information, however long they are."""
    ups.images["/dicom-web/studies/1/series/2/instances/3"] = bytes(8000) + DeflatedExplicitVRLittleEndian.encode()
    worklist = Worklist(WorklistConfig(url=ups.url, label="AI"), 1 << 20)
    with pytest.raises(PermanentFailure, match="the image is deflated"):
        worklist.retrieve_image(ImageReference("1", "2", "3", ""))


def test_authorization_is_sent_to_worklist_and_archive(gateway: OpenGateway, ups: UpsServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("Bearer s3cret\n")
    ups.add(workitem(), image())
    ups.before = lambda method, target: None if ups.headers.get("authorization") == "Bearer s3cret" else 400
    with gateway(worklist=table(ups, authorization_file=token)) as running:
        wait_until(lambda: is_over(running, ups))
    assert states(ups) == ["IN PROGRESS", "COMPLETED"]


def test_invalid_authorization_file_is_retried(gateway: OpenGateway, ups: UpsServer, tmp_path: Path) -> None:
    """An operator corrects the file while a workitem is in progress."""
    token = tmp_path / "token"
    token.write_text("Bearer s3cret")
    ups.add(workitem(), image())

    def spoil(method: str, target: str) -> None:
        if method == "PUT" and states(ups) == []:
            token.write_bytes("Bearer s3cret\n".encode("utf-16"))

    ups.before = spoil
    with gateway(worklist=table(ups, authorization_file=token)) as running:
        wait_until(lambda: running.dead() or "workitem claimed" in running.events())
        token.write_text("Bearer s3cret")
        wait_until(lambda: running.dead() or is_over(running, ups))
        assert running.dead() == []
    assert states(ups) == ["IN PROGRESS", "COMPLETED"]


def test_progress_is_reported_while_images_are_explained(gateway: OpenGateway, pacs: Pacs, ups: UpsServer) -> None:
    ups.add(workitem(), image(0), image(1))
    ready = threading.Event()
    first: list[str] = []

    def wait_for_report(method: str, target: str) -> int | None:
        if "/studies/" in target and not first:
            first.append(target)
        return 503 if "/studies/" in target and target not in first and not ready.is_set() else None

    ups.before = wait_for_report
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: "committed" in running.events())
        ready.set()
        wait_until(lambda: is_over(running, ups))
    reports = [changes.ProcedureStepProgressInformationSequence[0] for _, changes in ups.updates]
    assert [int(each.ProcedureStepProgress) for each in reports] in ([0, 50, 100], [50, 100])
    assert reports[-2].ProcedureStepProgressDescription == "1 of 2 images are finished"


def test_request_to_cancel_a_scheduled_workitem_is_honoured(gateway: OpenGateway, ups: UpsServer) -> None:
    uid = ups.add(workitem(), image())
    assert ups.request_cancel(uid) == 202
    with gateway(worklist=table(ups)):
        wait_until(lambda: len(ups.requests) > 2)
    assert ups.changes == []


def test_workitem_that_others_cancel_is_given_up(gateway: OpenGateway, pacs: Pacs, ups: UpsServer) -> None:
    """The worklist cancels a workitem in progress. The gateway changes it no more."""
    uid = ups.add(workitem(), image(0), image(1))
    pacs.down()
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: running.entries("outbox"))
        ups.items[uid].dataset.ProcedureStepState = "CANCELED"
        wait_until(lambda: "workitem lost" in running.events() and not running.entries("worklist"))
        assert [line["state"] for line in running.audit() if line["event"] == "workitem lost"] == ["CANCELED"]
        updates = len(ups.updates)
        pacs.up()
        wait_until(running.idle)
    assert states(ups) == ["IN PROGRESS"]
    assert len(ups.updates) == updates


@pytest.mark.parametrize("refused", ["POST", "PUT"])
def test_workitem_that_others_cancel_before_its_outcome_is_given_up(
    gateway: OpenGateway, pacs: Pacs, ups: UpsServer, refused: str
) -> None:
    """The worklist cancels a workitem after the gateway has seen it in progress, and refuses the outcome."""
    uid = ups.add(workitem(), image())

    def cancel(method: str, target: str) -> None:
        if method == refused and pacs.objects_by_uid:
            ups.items[uid].dataset.ProcedureStepState = "CANCELED"

    ups.before = cancel
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: running.dead() or ("workitem lost" in running.events() and is_over(running, ups)))
        assert running.dead() == []
        assert [line["state"] for line in running.audit() if line["event"] == "workitem lost"] == ["CANCELED"]
    assert states(ups) == ["IN PROGRESS"]


def test_deleted_workitem_is_given_up(gateway: OpenGateway, pacs: Pacs, ups: UpsServer) -> None:
    uid = ups.add(workitem(), image())
    pacs.down()
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: running.entries("outbox"))
        del ups.items[uid]
        wait_until(lambda: not running.entries("worklist"))
        assert [line["state"] for line in running.audit() if line["event"] == "workitem lost"] == ["deleted"]
        pacs.up()
        wait_until(running.idle)


def test_refused_outcome_is_kept(gateway: OpenGateway, ups: UpsServer) -> None:
    """An operator moves the entry back when the cause is corrected."""
    uid = ups.add(workitem(), image())
    ups.before = lambda method, target: 400 if method == "PUT" and ups.state(uid) == "IN PROGRESS" else None
    with gateway(worklist=table(ups)) as running:
        wait_until(running.dead)
        assert running.dead()[0]["reason"] == "the worklist refuses the state COMPLETED"
        ups.before = lambda method, target: None
        [entry] = running.entries("dead")
        entry.rename(entry.parent.parent / "worklist" / entry.name)
        wait_until(lambda: is_over(running, ups))
    assert states(ups) == ["IN PROGRESS", "COMPLETED"]


def test_image_that_a_modality_sends_as_well(gateway: OpenGateway, pacs: Pacs, ups: UpsServer) -> None:
    """The image is in progress when the workitem is claimed. It is explained once, and both get its results."""
    pacs.down()
    with gateway(worklist=table(ups)) as running:
        assert send(running.address, image()) == [0]
        wait_until(lambda: running.entries("outbox"))
        uid = ups.add(workitem(), image())
        wait_until(lambda: ups.updates)  # the progress
        pacs.up()
        wait_until(lambda: is_over(running, ups))
    assert running.events().count("explained") == 1
    assert outputs(ups.items[uid].dataset).keys() == {str(each.SOPInstanceUID) for each in pacs.objects()}


def test_notification_that_cannot_be_sent_does_not_delay_a_workitem(
    gateway: OpenGateway, pacs: Pacs, ups: UpsServer
) -> None:
    """The second workitem refers to results that are in the PACS already."""
    ups.add(workitem(1), image())
    with webhook() as hook:
        hook.status = lambda: (503, {})
        with gateway(worklist=table(ups), notifications=[{"name": "ris", "url": hook.url}]) as running:
            wait_until(lambda: ups.state(workitem(1).SOPInstanceUID) == "COMPLETED")
            second = ups.add(workitem(2), image())
            wait_until(lambda: ups.state(second) == "COMPLETED")
            assert running.entries("notify")
    assert outputs(ups.items[second].dataset).keys() == {str(each.SOPInstanceUID) for each in pacs.objects()}
    assert running.events().count("explained") == 1


def test_metrics_and_health(gateway: OpenGateway, pacs: Pacs, ups: UpsServer) -> None:
    ups.add(workitem(), image())
    pacs.down()
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: running.entries("outbox"))
        text = request(running, "/metrics")[1]
        assert 'camserve_gateway_entries{stage="worklist"} 1.0' in text
        assert 'camserve_gateway_events_total{event="workitem claimed"} 1.0' in text
        assert request(running, "/health")[0] == 200


NO_STATE = b'[{"00741000": {"vr": "CS", "Value": ["ZWETSCHGE"]}}]'


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'[{"00741000": 5}]', b"[]", b"[{}]", NO_STATE])
@pytest.mark.parametrize(("part", "state"), [("?", "SCHEDULED"), ("/", "SCHEDULED"), ("/", "IN PROGRESS")])
def test_nonsense_of_the_worklist_is_retried(
    gateway: OpenGateway, ups: UpsServer, body: bytes, part: str, state: str
) -> None:
    """The responses of searches, or those of retrievals of a workitem, make no sense three times."""
    uid = ups.add(workitem(), image())
    left = [1, 2, 3]

    def raw(method: str, target: str) -> bytes | None:
        if method == "GET" and f"/workitems{part}" in target and ups.state(uid) == state and left:
            left.pop()
            return body
        return None

    ups.raw = raw
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: is_over(running, ups))
        assert running.dead() == []
    assert ups.state(uid) == "COMPLETED"
    assert not left


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize("fault", ["in the search", "no JSON", "no sequence"])
def test_unreadable_workitem_does_not_delay_others(gateway: OpenGateway, ups: UpsServer, fault: str) -> None:
    """The worklist lists an urgent workitem that is never readable."""
    urgent = workitem(1, ScheduledProcedureStepPriority="HIGH")
    unreadable, other = ups.add(urgent, image(0)), ups.add(workitem(2), image(1))
    if fault == "no sequence":
        urgent.add_new("ScheduledStationNameCodeSequence", "LO", "text")
        ups.ignores = {"ScheduledStationNameCodeSequence.CodeValue"}

    def raw(method: str, target: str) -> bytes | None:
        if fault == "in the search" and method == "GET" and "?" in target:
            return json.dumps([{"00741200": 5}, ups.items[other].dataset.to_json_dict()]).encode()
        return b"{" if fault == "no JSON" and target.endswith(f"/workitems/{unreadable}") else None

    ups.raw = raw
    with gateway(worklist=table(ups)) as running:
        wait_until(lambda: "workitem completed" in running.events())
    assert {uid for uid, _, _ in ups.changes} == {other}


def test_search_waits_as_long_as_the_worklist_requests(
    gateway: OpenGateway, ups: UpsServer, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(worklist: Worklist) -> list[str]:
        raise TemporaryFailure("worklist: HTTP 503", 77.0)

    monkeypatch.setattr(Worklist, "search", search)
    with gateway(worklist=table(ups)):
        wait_until(lambda: any(line["event"] == "the worklist cannot be searched" for line in log))
    assert [line["wait_s"] for line in log if line["event"] == "the worklist cannot be searched"] == [77.0]
