"""The conditions of rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from camserve_dicom.gateway.config import ConfigError, read
from camserve_dicom.gateway.rules import ImageAttributes, Rule
from tests.dicom.gateways import RULE, OpenGateway
from tests.dicom.pacs import Pacs, image, send, wait_until
from tests.dicom.samples import image as ct_image
from tests.dicom.samples import ramp
from tests.dicom.test_gateway_config import MINIMAL


def view_code(value: str, meaning: str) -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return [item]


CHEST = {"Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "PA", "SeriesDescription": "Thorax pa stehend"}
MAMMOGRAM: dict[str, Any] = {
    "Modality": "MG",
    "ImageLaterality": "R",
    "ViewCodeSequence": view_code("399162004", "cranio-caudal"),
}


def matches(attributes: dict[str, Any], **conditions: Any) -> bool:
    header = ct_image(ramp(40, 60), **attributes)
    return Rule(**conditions).matches(ImageAttributes.of(header), "MODALITY")


@pytest.mark.parametrize(
    ("attributes", "conditions", "expected"),
    [
        (CHEST, {"view": "pa"}, True),
        (CHEST, {"view": ["LL", "LATERAL"]}, False),
        (MAMMOGRAM, {"view": "399162004"}, True),
        (MAMMOGRAM, {"view": "Cranio-Caudal"}, True),
        (MAMMOGRAM, {"view": "CC"}, False),
        (MAMMOGRAM, {"laterality": "R"}, True),
        (MAMMOGRAM, {"laterality": ["l", "b"]}, False),
        ({"Laterality": "L"}, {"laterality": "L"}, True),
        ({}, {"laterality": "U"}, False),
        ({}, {"view": "PA"}, False),
        (CHEST, {"series_description": "thorax*"}, True),
        (CHEST, {"series_description": ["*lateral*", "THORAX PA ?TEHEND"]}, True),
        (CHEST, {"series_description": "thorax"}, False),
        ({}, {"series_description": "*"}, True),
        ({"SeriesDescription": "Chest [PA]"}, {"series_description": "chest [pa]"}, True),
        ({"SeriesDescription": "Chest P"}, {"series_description": "chest [pa]"}, False),
        (CHEST, {"min_size": [40, 60]}, True),
        (CHEST, {"min_size": [41, 60]}, False),
        (CHEST, {"min_size": [40, 61]}, False),
        (CHEST, {"max_size": [40, 60]}, True),
        (CHEST, {"max_size": [39, 60]}, False),
        (CHEST, {"max_size": [40, 59]}, False),
        (CHEST, {"body_part": "chest", "view": "PA", "min_size": [1, 1]}, True),
        (CHEST, {"body_part": "HAND", "view": "PA"}, False),
    ],
)
def test_conditions(attributes: dict[str, Any], conditions: dict[str, Any], expected: bool) -> None:
    assert matches(attributes, **conditions) is expected


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ('laterality = "right"', "rules.0.laterality.0"),
        ("min_size = 512", "rules.0.min_size"),
        ("max_size = [0, 1]", "rules.0.max_size.0"),
        ("view = []", "rules.0.view"),
    ],
)
def test_invalid_conditions(tmp_path: Path, rule: str, key: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(f"{MINIMAL}\n[[rules]]\n{rule}\n")
    with pytest.raises(ConfigError) as wrong:
        read(path)
    assert str(wrong.value).startswith(f"{key}: ")


@pytest.mark.usefixtures("broken_associations")
@pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")
def test_gateway_applies_the_conditions(gateway: OpenGateway, pacs: Pacs) -> None:
    rules = [RULE | {"view": "PA", "series_description": "*chest*", "min_size": [48, 40]}]
    selected = image(0, ViewPosition="PA", SeriesDescription="Chest, erect")
    others = [image(1, ViewPosition="LATERAL", SeriesDescription="Chest, erect"), image(2, ViewPosition="PA"), image(3)]
    with gateway(rules=rules) as running:
        assert send(running.address, selected, *others) == [0] * 4
        wait_until(lambda: "committed" in running.events() and running.idle())
    [made] = pacs.objects()
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == selected.SOPInstanceUID
    dropped = [line for line in running.audit() if line["event"] == "dropped"]
    assert [line["reason"] for line in dropped] == ["no rule"] * 3
    assert "erect" not in (running.spool / "audit.jsonl").read_text()
