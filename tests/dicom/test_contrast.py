"""Constant and saturated images: no overlay, or a warning in all results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import UltrasoundMultiFrameImageStorage

import camserve
import camserve_dicom as dicom
from camserve_dicom import DicomExplanation, contrast
from tests.dicom.gateways import RULE, OpenGateway
from tests.dicom.pacs import Pacs, send, wait_until
from tests.dicom.pacs import image as radiograph
from tests.dicom.samples import data_of, errors, explanation, image, needs_dciodvfy, ramp
from tests.dicom.test_explain import run

COLOURS = np.random.default_rng(2).integers(1, 255, (40, 60, 3), dtype=np.uint8)
OUTSIDE = {"WindowCenter": 60000, "WindowWidth": 10}
CONSTANT: dict[str, Any] = {
    "constant values": image(np.full((40, 60), 1234, np.uint16)),
    "a window above all values": image(ramp(40, 60), **OUTSIDE),
    "a window below all values": image(ramp(40, 60) + 100, WindowCenter=5, WindowWidth=10),
    "an inverted window above all values": image(ramp(40, 60), PhotometricInterpretation="MONOCHROME1", **OUTSIDE),
    "a white tile": image(np.full((40, 60, 3), 255, np.uint8)),
    "a black frame": image(
        np.zeros((2, 40, 60), np.uint8), SOPClassUID=UltrasoundMultiFrameImageStorage, Modality="US"
    ),
    "one colour": image(np.full((40, 60, 3), (200, 30, 90), np.uint8)),
}


def texts(made: Any) -> str:
    return "\n".join(str(each.value) for each in made.iterall() if each.keyword == "TextValue")


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("check", [None, "insertion>deletion"])
@needs_dciodvfy
def test_constant_image_gives_only_reports(name: str, check: str | None, tmp_path: Path) -> None:
    rendered = dicom.read(CONSTANT[name])
    made = dicom.objects(explanation(rendered.pixels), rendered, dicom.KINDS, check=check)
    assert list(made) == ["sr", "esr", "pdf"]
    for kind, report in made.items():
        assert kind == "pdf" or "The overlay is withheld. The image is constant" in texts(report)
        assert errors(report, tmp_path) == []


def test_images_with_two_levels_are_explained() -> None:
    pixels = np.zeros((40, 60), np.uint8)
    pixels[20, 30] = 255
    rendered = dicom.read(image(pixels, WindowCenter=128, WindowWidth=256))
    assert list(dicom.objects(explanation(rendered.pixels), rendered, check=None)) == ["sc", "sr"]


@pytest.mark.parametrize(
    ("pixels", "share"),
    [
        (np.r_[np.zeros(990), 7 * np.ones(10)], None),
        (np.r_[np.zeros(500), 255 * np.ones(491), 7 * np.ones(9)], "99.1"),
        (np.r_[np.zeros(99_999), 7], "99.9"),
        (np.r_[np.zeros(500), 255 * np.ones(500)], "100"),
    ],
)
def test_saturated_pixels_are_counted(pixels: np.ndarray, share: str | None) -> None:
    grey = pixels.astype(np.uint8).reshape(-1, 10)
    for each in (grey, np.stack([grey, grey, grey], axis=-1)):
        found = contrast.saturation_warnings(each)
        assert found == (
            (f"saturated image: {share}% of its pixels are black or white; check its window",) * bool(share)
        )


def test_pixel_of_a_saturated_channel_is_not_saturated() -> None:
    assert contrast.saturation_warnings(np.full((4, 4, 3), (255, 0, 7), np.uint8)) == ()


def saturated() -> Any:
    return image(ramp(40, 60), WindowCenter=8000, WindowWidth=10)


def test_warning_is_in_all_outputs(client: camserve.Client, address: str, tmp_path: Path) -> None:
    made = dicom.explain(client, saturated(), check=None)
    [warning] = [each for each in made.warnings if each.startswith("saturated image: 99.")]
    assert warning in texts(made.objects["sr"])
    clear = dicom.explain(client, image(ramp(40, 60)), check=None)
    assert clear.warnings == clear.explanation.warnings
    assert made.objects["sc"].Rows > clear.objects["sc"].Rows, "the legend has further lines"
    path = tmp_path / "case.dcm"
    path.write_bytes(data_of(saturated()))
    arguments = (path, "--address", address, "--out", tmp_path, "--check", "none")
    assert f"warning: {path}: {warning}" in run(*arguments).stderr
    assert warning in json.loads(run(*arguments, "--json").stdout)["warnings"]


def test_warning_of_the_server_is_in_the_legend() -> None:
    rendered = dicom.read(image(ramp(40, 60)))
    plain = explanation(rendered.pixels)
    warning = "nearly constant image: 98% of its pixels are within 3 of 256"
    warned = dataclasses.replace(plain, warnings=(warning,))
    first, second = (dicom.objects(each, rendered, ["sc"], check=None)["sc"] for each in (plain, warned))
    assert second.Rows > first.Rows


def test_gateway_stores_a_report_of_a_constant_image(gateway: OpenGateway, pacs: Pacs) -> None:
    with gateway(rules=[RULE | {"outputs": ["sc", "sr"], "check": ""}]) as running:
        window = {"WindowCenter": 60000, "WindowWidth": 10}
        assert send(running.address, radiograph(0, **window)) == [0]
        assert send(running.address, radiograph(1, WindowCenter=2000, WindowWidth=2)) == [0]
        wait_until(lambda: running.events().count("committed") == 2)
        audit = {line["event"]: line for line in running.audit()}
    assert sorted(each.Modality for each in pacs.objects()) == ["OT", "SR", "SR"]
    assert audit["withheld"]["reason"].startswith("The image is constant")
    assert audit["explained"]["warnings"][0].startswith("saturated image")


def test_warnings_default_to_none() -> None:
    rendered = dicom.read(image(ramp()))
    assert DicomExplanation(explanation(rendered.pixels), rendered, {}, "").warnings == ()
