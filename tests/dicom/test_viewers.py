"""Reports as viewers read them: the rules of OHIF, and OHIF's own code where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

import camserve_dicom as dicom
from tests.dicom.samples import INSTANCE, explanation, image, ramp
from tests.dicom.test_objects import multi_frame

# A folder with packages of npm, see ohif.cjs.
OHIF = os.environ.get("OHIF_PACKAGES")
LABELS = [
    "Probability of the class",
    "Insertion, area under the curve",
    "Deletion, area under the curve",
    "Average gain",
    "Share of saliency inside the image content",
]


def reports(check: str | None = None) -> dict[str, Dataset]:
    rendered = dicom.read(image(ramp(40, 60)))
    return dicom.objects(explanation(rendered.pixels), rendered, ["sr", "esr"], check=check)


def children(item: Dataset, code: str) -> list[Dataset]:
    return [each for each in item.ContentSequence if each.ConceptNameCodeSequence[0].get("CodeValue") == code]


def loaded(report: Dataset) -> dict[str, Any]:
    """Read a report by the rules of getSopClassHandlerModule.ts of OHIF 3.13. It raises where OHIF does."""
    assert report.ConceptNameCodeSequence[0].CodeValue == "126000", "TID 1500"
    [library] = children(report, "111028")
    group = children(library, "126200")[0]
    images = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in group.ContentSequence]
    measurements = []
    for each in children(children(report, "126010")[0], "125007"):
        items = each.ContentSequence
        assert all("ConceptNameCodeSequence" in item for item in items)
        region = next(item for item in items if item.ValueType == "SCOORD")
        assert region.RelationshipType in ("CONTAINS", "INFERRED FROM")
        [reference] = region.ContentSequence[0].ReferencedSOPSequence
        measured = [item for item in items if item.ValueType == "NUM"]
        measurements.append(
            {
                "uid": children(each, "112040")[0].UID,
                "name": children(each, "112039")[0].TextValue,
                "labels": [item.ConceptNameCodeSequence[0].CodeMeaning for item in measured],
                "units": [item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue for item in measured],
                "points": len(region.GraphicData) // 2,
                "instance": reference.ReferencedSOPInstanceUID,
                "frame": reference.get("ReferencedFrameNumber"),
            }
        )
    return {"images": images, "measurements": measurements}


@pytest.mark.parametrize("kind", ["sr", "esr"])
@pytest.mark.parametrize("check", [None, "insertion>=0.9"])
def test_report_follows_the_rules_of_ohif(kind: str, check: str | None) -> None:
    made = reports(check)
    found = loaded(made[kind])
    assert found["images"] == [INSTANCE]
    [measurement] = found["measurements"]
    assert measurement["labels"] == LABELS
    assert measurement["units"] == ["1", "1", "1", "%", "1"]
    assert (measurement["instance"], measurement["frame"]) == (INSTANCE, None)
    assert measurement["points"] == (5 if check else 29), "the outline of the image, or of the map"


def test_report_of_a_frame_references_the_frame() -> None:
    rendered = dicom.read(multi_frame(), frame=1)
    made = dicom.objects(explanation(rendered.pixels), rendered, ["sr"], check=None)["sr"]
    assert {each["frame"] for each in loaded(made)["measurements"]} == {2}


needs_ohif = pytest.mark.skipif(
    OHIF is None, reason="needs packages of npm, see tests/dicom/ohif.cjs; set OHIF_PACKAGES"
)


def read_by_ohif(folder: Path, *made: Dataset) -> list[dict[str, Any]]:
    """Return what OHIF's own code reads from reports."""
    paths = [folder / f"{number}.dcm" for number in range(len(made))]
    for path, report in zip(paths, made, strict=True):
        report.save_as(path, enforce_file_format=True)
    script = Path(__file__).with_name("ohif.cjs")
    ran = subprocess.run(["node", script, str(OHIF), *paths], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == len(paths)
    return lines


@pytest.mark.slow
@needs_ohif
def test_ohif_loads_the_report(tmp_path: Path) -> None:
    for line in read_by_ohif(
        tmp_path, *[each for check in (None, "insertion>=0.9") for each in reports(check).values()]
    ):
        assert line["messages"] == []
        assert [each["ReferencedSOPInstanceUID"] for each in line["referencedImages"]] == [INSTANCE]
        [measurement] = line["measurements"]
        assert [each["label"] for each in measurement["labels"]] == LABELS
        assert measurement["labels"][3]["value"] == "12.50 %"
        assert measurement["coords"][0]["GraphicType"] == "POLYLINE"
        assert measurement["coords"][0]["ReferencedSOPSequence"][0]["ReferencedSOPInstanceUID"] == INSTANCE
