"""Reports of studies by the gateway."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from camserve_dicom.gateway.config import ConfigError, read
from camserve_server.service.server import Server
from tests.dicom.gateways import RULE, OpenGateway, Spooled, config, opened
from tests.dicom.pacs import NAME, Pacs, image, send, wait_until
from tests.dicom.samples import errors, needs_dciodvfy
from tests.dicom.test_gateway_config import MINIMAL
from tests.dicom.test_objects import texts
from tests.dicom.test_study_report import findings, references

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]

STUDY: dict[str, Any] = {"quiet_s": 0.3}
# It is longer than a test.
NEVER: dict[str, Any] = {"quiet_s": 3600.0}


def with_number(pacs: Pacs, series_number: int) -> list[Dataset]:
    """Return the stored objects of a kind, in the order of their arrival."""
    return [each for each in pacs.objects() if each.SeriesNumber == series_number]


def reports(pacs: Pacs) -> list[Dataset]:
    """Return the reports of studies."""
    return with_number(pacs, 9008)


def selections(pacs: Pacs) -> list[Dataset]:
    """Return the Key Object Selections."""
    return with_number(pacs, 9009)


def predecessors(report: Dataset) -> list[str]:
    """Return the SOP Instance UIDs of the predecessors of a report."""
    return [
        str(document.ReferencedSOPInstanceUID)
        for study in report.get("PredecessorDocumentsSequence", [])
        for series in study.ReferencedSeriesSequence
        for document in series.ReferencedSOPSequence
    ]


def wait_for_reports(running: Spooled, number: int) -> None:
    wait_until(lambda: running.events().count("study reported") == number and running.idle())


@needs_dciodvfy
def test_report_references_all_results(
    gateway: OpenGateway, pacs: Pacs, send_together: Callable[..., list[int | None]], tmp_path: Path
) -> None:
    rule = RULE | {"outputs": ["sc", "sr", "pdf"]}
    with gateway(study=STUDY, rules=[rule], flags=[{"min_probability": 0.0}]) as running:
        assert send_together(running.address, image(0), image(1)) == [0, 0]
        wait_for_reports(running, 1)
        [report], [selection] = reports(pacs), selections(pacs)
        results = {str(each.SOPInstanceUID) for each in pacs.objects()} - {
            report.SOPInstanceUID,
            selection.SOPInstanceUID,
        }
        sources = {str(image(0).SOPInstanceUID), str(image(1).SOPInstanceUID)}
        assert len(results) == 6
        assert references(report) == results | sources
        assert references(selection) == sources
        assert "Images of the study in this report: 2." in texts(report)
        assert (str(report.PatientName), report.StudyInstanceUID) == (NAME, image().StudyInstanceUID)
        assert pacs.stores[-2:] == [selection.SOPInstanceUID, report.SOPInstanceUID], "after all results"
        for each in (report, selection):
            assert errors(each, tmp_path) == []
        [line] = [line for line in running.audit() if line["event"] == "study reported"]
        assert line["images"] == 2
        assert {each["object"] for each in running.audit() if each["event"] == "committed"} >= {line["object"]}
        text = (running.spool / "audit.jsonl").read_text()
    for secret in (NAME, "Q-4711", "1.2.826", "2.25."):
        assert secret not in text


def test_late_image_gives_a_report_with_a_predecessor(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway(study=STUDY, flags=[{"min_probability": 0.0}]) as running:
        assert send(running.address, image(0)) == [0]
        wait_for_reports(running, 1)
        assert send(running.address, image(1)) == [0]
        wait_for_reports(running, 2)
    first, second = reports(pacs)
    assert predecessors(first) == []
    assert predecessors(second) == [first.SOPInstanceUID]
    assert references(second) > references(first)
    assert [len(references(each)) for each in selections(pacs)] == [1, 2]


def test_image_that_is_sent_again_gives_no_further_report(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    settings = config(tmp_path, tiny, pacs, study=STUDY)
    with opened(settings, pacs) as running:
        assert send(running.address, image(0)) == [0]
        wait_for_reports(running, 1)
    with opened(settings, pacs) as running:  # after a restart
        assert send(running.address, image(0)) == [0]
        wait_until(lambda: running.events().count("explained") == 2 and running.idle())
        [folder] = (running.spool / "studies").iterdir()
        changed = (folder / "images").stat().st_mtime
        os.utime(folder / "images", (changed - 10, changed - 10))  # the study has been quiet for long enough
        assert send(running.address, image(5, StudyInstanceUID="1.2.3.4")) == [0]  # its report comes later than none
        wait_for_reports(running, 2)
    assert len(reports(pacs)) == 2
    assert {each.StudyInstanceUID for each in reports(pacs)} == {image().StudyInstanceUID, "1.2.3.4"}


def test_incomplete_study_has_no_report(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway(study=NEVER) as running:
        assert send(running.address, image(0)) == [0]
        wait_until(lambda: "committed" in running.events() and running.idle())
        [folder] = (running.spool / "studies").iterdir()
        assert sorted(path.name for path in folder.iterdir()) == ["header.dcm", "images"]
    assert reports(pacs) == []


def test_report_waits_for_the_results(gateway: OpenGateway, pacs: Pacs) -> None:
    """The PACS refuses the overlay of one image for a while."""
    refused = True

    def refuse(dataset: Dataset) -> int | None:
        return 0xA700 if refused and dataset.SeriesNumber == 9001 else None

    pacs.before = refuse
    with gateway(study=STUDY) as running:
        assert send(running.address, image(0)) == [0]
        wait_until(lambda: running.entries("outbox"))
        [folder] = (running.spool / "studies").iterdir()
        changed = (folder / "images").stat().st_mtime
        os.utime(folder / "images", (changed - 10, changed - 10))
        assert send(running.address, image(1, StudyInstanceUID="1.2.3.4")) == [0]
        wait_until(lambda: len(running.entries("outbox")) == 2)
        assert "study reported" not in running.events()
        refused = False
        wait_for_reports(running, 2)
    assert len(reports(pacs)) == 2


def test_report_counts_images_that_could_not_be_explained(
    gateway: OpenGateway, pacs: Pacs, send_together: Callable[..., list[int | None]]
) -> None:
    with gateway(study=STUDY) as running:
        assert send_together(running.address, image(0), image(1, BurnedInAnnotation="YES")) == [0, 0]
        wait_for_reports(running, 1)
        assert len(running.dead()) == 1
    [report] = reports(pacs)
    assert "Images of the study in this report: 1." in texts(report)
    assert "Images of the study that could not be explained: 1." in texts(report)


def test_study_is_complete_with_the_expected_number(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway(study=NEVER | {"expected_images": 2}) as running:
        assert send(running.address, image(0)) == [0]
        wait_until(lambda: running.events().count("committed") == 1 and running.idle())
        assert "study reported" not in running.events()
        assert send(running.address, image(1)) == [0]
        wait_for_reports(running, 1)
        assert send(running.address, image(2)) == [0]
        wait_for_reports(running, 2)
    first, second = reports(pacs)
    assert "Images of the study in this report: 2." in texts(first)
    assert predecessors(second) == [first.SOPInstanceUID]


def test_report_says_how_many_images_were_left_out(
    gateway: OpenGateway, pacs: Pacs, send_together: Callable[..., list[int | None]]
) -> None:
    rules = [{"modality": "DX", "ignore": True}, RULE]
    images = [image(number) for number in range(4)]
    with gateway(study=STUDY | {"max_images": 2}, rules=rules) as running:
        assert send_together(running.address, image(8, Modality="DX"), *images, images[3], images[0]) == [0] * 7
        wait_for_reports(running, 1)
        dropped = [line["reason"] for line in running.audit() if line["event"] == "dropped"]
    assert dropped.count("the study has max_images") == 3
    assert dropped.count("no rule") == 1
    [report] = reports(pacs)
    said = texts(report)
    assert "Images of the study in this report: 2." in said
    assert "Images of the study that were left out, because at most 2 of a study are explained: 2." in said
    assert "Images of the study that no rule selects: 1." in said
    assert {str(each.SOPInstanceUID) for each in images[:2]} < references(report)


def test_codes_of_the_configuration(gateway: OpenGateway, pacs: Pacs) -> None:
    classes = [
        {"target": index, "code": "404684003", "scheme": "SCT", "meaning": "Clinical finding"} for index in range(10)
    ]
    with gateway(study=STUDY | {"report": "esr"}, classes=classes, rules=[RULE | {"outputs": ["sr"]}]) as running:
        assert send(running.address, image(0)) == [0]
        wait_for_reports(running, 1)
    assert len(pacs.objects()) == 2
    for each in pacs.objects():
        assert findings(each) == {("404684003", "SCT", "Clinical finding")}
    assert reports(pacs)[0].SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.22"


def test_old_studies_are_deleted(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    settings = config(tmp_path, tiny, pacs, study=STUDY, retention_h=1)
    with opened(settings, pacs) as running:
        assert send(running.address, image(0)) == [0]
        wait_for_reports(running, 1)
        [folder] = (running.spool / "studies").iterdir()
        changed = (folder / "images").stat().st_mtime
        os.utime(folder / "images", (changed - 3700, changed - 3700))
    with opened(settings, pacs) as running:
        assert not [*(running.spool / "studies").iterdir()]


def test_failed_report_is_logged_without_header_values(
    gateway: OpenGateway, pacs: Pacs, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(NAME)

    monkeypatch.setattr("camserve_dicom.gateway.studies.study_objects", fail)
    with gateway(study=STUDY) as running:
        assert send(running.address, image(0)) == [0]
        wait_until(lambda: [line for line in log if line["event"] == "report of a study failed"])
    [line, *_] = [line for line in log if line["event"] == "report of a study failed"]
    assert line["reason"] == "ValueError"
    assert NAME not in json.dumps([each for each in log if "event" in each], default=str)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            "[[flags]]\nmin_probability = 0.5\n",
            "flags: flagged images are selected when a study is complete; add [study]",
        ),
        (
            "[study]\n[[flags]]\nmin_probability = 2\n",
            "flags.0.min_probability: Input should be less than or equal to 1",
        ),
        ("[study]\nexpected_images = 3\nmax_images = 2\n", "study.expected_images: 3 is more than max_images, 2"),
        ("[study]\nmax_images = 0\n", "study.max_images: Input should be greater than or equal to 1"),
        ("[study]\nquiet_s = 0\n", "study.quiet_s: Input should be greater than 0"),
        ('[study]\nreport = "pdf"\n', "study.report: Input should be 'sr' or 'esr'"),
        (
            '[[classes]]\ntarget = "a"\ncode = "60046009"\nscheme = "SCT"\nmeaning = "m"\n',
            "classes.0.code: is '60046009', which is not an identifier of SNOMED CT",
        ),
        (
            '[[classes]]\ntarget = 1\ncode = "1"\nscheme = "SNOMED"\nmeaning = "m"\n',
            "classes.0.scheme: is 'SNOMED'; expected the designator SCT",
        ),
        ('[[classes]]\ntarget = 1\ncode = "1"\nscheme = "LN"\n', "classes.0.meaning: Field required"),
        (
            '[[classes]]\ntarget = 1\ncode = "1"\nscheme = "LN"\nmeaning = "m"\n' * 2,
            "classes.1.target: 1 has a code already",
        ),
    ],
)
def test_errors_of_the_configuration(tmp_path: Path, added: str, message: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(MINIMAL + added)
    with pytest.raises(ConfigError) as wrong:
        read(path)
    assert str(wrong.value).startswith(message)
