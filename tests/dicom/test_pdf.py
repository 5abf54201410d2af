"""The report as Encapsulated PDF, read and rendered by PDFium."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pytest
from pydicom import Dataset

import camserve_dicom as dicom
from camserve.errors import InvalidArgument
from camserve_dicom.gateway.config import ConfigError, read
from camserve_dicom.pdf_document import REPLACEMENT
from tests.dicom.samples import INSTANCE, data_of, errors, explanation, image, needs_dciodvfy, ramp
from tests.dicom.test_gateway_config import MINIMAL
from tests.dicom.test_objects import multi_frame

MATPLOTLIB = Path(str(importlib.metadata.distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf")))
# It has a glyph for each character, among them Chinese ones.
LAST_RESORT = MATPLOTLIB / "LastResortHE-Regular.ttf"

# Rows of a page at 72 dpi between the prediction and the colour scale.
PICTURES = slice(300, 500)


def report(source: Dataset, *, check: str | None = None, frame: int = 0, fonts: Any = (), **given: Any) -> Dataset:
    rendered = dicom.read(source, frame=frame)
    of = explanation(rendered.pixels, **given)
    return dicom.objects(of, rendered, ["pdf"], check=check, pdf_fonts=fonts)["pdf"]


def pages(made: Dataset) -> list[str]:
    """Return the text of each page, with lines joined."""
    with pypdfium2.PdfDocument(bytes(made.EncapsulatedDocument)) as document:
        texts = [page.get_textpage().get_text_bounded() for page in document]
    return [re.sub(r"\s+", " ", text) for text in texts]


def rendered_page(made: Dataset, scale: float = 1.0) -> np.ndarray:
    """Return the first page as RGB pixels [H, W, 3]."""
    with pypdfium2.PdfDocument(bytes(made.EncapsulatedDocument)) as document:
        pixels: np.ndarray = np.array(document[0].render(scale=scale).to_pil().convert("RGB"))
        return pixels


def coloured(pixels: np.ndarray) -> np.ndarray:
    """Return which pixels [H, W] are neither grey nor the pale yellow of the box."""
    low, high = pixels.min(axis=2).astype(int), pixels.max(axis=2).astype(int)
    found: np.ndarray = np.logical_and(high - low > 60, low < 180)
    return found


def test_pages_have_all_parts_of_the_report() -> None:
    made = report(image(ramp(64, 64), SeriesDescription="Thorax pa"))
    text = " ".join(pages(made))
    for part in (
        "Wintersohn Amelie, ID PID-4711-0815, born 1952-03-17, sex F",
        "2024-02-29", "ACC-993311", "Thorax bei Verdacht", "Thorax pa", INSTANCE,
        "effusion (class 3)", "Probability of the class 0.875", "Insertion, area under the curve 0.7",
        "Average gain 12.5 %",
        "poly-cam", "thorax", "sha256:" + "ab" * 32, "sha256:" + "cd" * 32, "sha256:" + "ef" * 32, "torch 2",
        "A map shows what influenced the model, not where disease is.", "Read the original image.",
        f"UID {made.SOPInstanceUID}",
    ):  # fmt: skip
        assert part in text, part
    for page in pages(made):
        assert "RESEARCH USE ONLY" in page
        assert "Wintersohn Amelie" in page


def test_attributes_of_the_object() -> None:
    made = report(multi_frame(), frame=1)
    assert made.SOPClassUID == "1.2.840.10008.5.1.4.1.1.104.1"
    assert (made.Modality, made.MIMETypeOfEncapsulatedDocument) == ("DOC", "application/pdf")
    assert made.BurnedInAnnotation == "YES"
    [source] = made.SourceInstanceSequence
    assert (source.ReferencedSOPInstanceUID, "ReferencedFrameNumber" in source) == (INSTANCE, False)
    assert "Frame 2" in pages(made)[0]
    document = made.EncapsulatedDocument[: made.EncapsulatedDocumentLength]
    assert document.startswith(b"%PDF-")
    assert document.rstrip().endswith(b"%%EOF")


@needs_dciodvfy
@pytest.mark.slow
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"StudyDate": "", "StudyTime": ""},
        {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"},
        {"BodyPartExamined": "BREAST", "ImageLaterality": "R"},
    ],
)
def test_dciodvfy_accepts_the_object(attributes: dict[str, Any], tmp_path: Path) -> None:
    assert errors(report(image(ramp(), **attributes)), tmp_path) == []


def test_pictures_show_the_image_and_the_map() -> None:
    flat = np.full((64, 64), 1000, np.uint16)
    flat[::2] = 1100
    shown = rendered_page(report(image(flat)))
    middle = shown.shape[1] // 2
    pictures = shown[PICTURES]
    assert not coloured(pictures[:, :middle]).any(), "the original is on the left"
    assert coloured(pictures[:, middle:]).any(), "the overlay is on the right"


def test_withheld_overlay_is_not_shown() -> None:
    made = report(image(ramp(64, 64)), check="insertion>0.9")
    assert "Warning: The overlay is withheld. The faithfulness check insertion > 0.9 failed" in pages(made)[0]
    assert not coloured(rendered_page(made)[PICTURES]).any()


def test_same_bytes_for_another_request_id() -> None:
    first, second = (report(image(ramp()), request_id=each) for each in ("one", "another"))
    assert data_of(first) == data_of(second)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Müller^Jürgen", "Müller Jürgen"),
        ("Иванов^Иван", "Иванов Иван"),
        ("Διονυσιος", "Διονυσιος"),
        ("Kovács^\u0301Éva", "Kovács"),
    ],
)
def test_names_in_other_scripts(name: str, shown: str) -> None:
    [first, *_] = pages(report(image(ramp(), SpecificCharacterSet="ISO_IR 192", PatientName=name)))
    assert shown in first
    assert REPLACEMENT not in first


@pytest.mark.slow
def test_arabic_letters_are_joined_from_right_to_left() -> None:
    """Isolated letters are wider than joined ones."""
    joined, apart = (
        rendered_page(report(image(ramp(), SpecificCharacterSet="ISO_IR 192", PatientName=name)), 3)
        for name in ("ممممم", "م\u200cم\u200cم\u200cم\u200cم")
    )
    line = slice(175, 215)  # the patient
    width, isolated_width = (np.flatnonzero((each[line] < 128).any(axis=(0, 2)))[-1] for each in (joined, apart))
    assert width < isolated_width


def test_characters_without_a_font(caplog: pytest.LogCaptureFixture) -> None:
    source = image(ramp(), SpecificCharacterSet="ISO_IR 192", PatientName="Yamada^Tarou=山田^太郎")
    with caplog.at_level(logging.DEBUG):
        made = report(source)
    assert f"Yamada Tarou = {REPLACEMENT * 2} {REPLACEMENT * 2}, ID" in pages(made)[0]
    assert "set pdf_fonts to a font that has them" in pages(made)[-1]
    assert "山" not in caplog.text
    with_font = report(source, fonts=[LAST_RESORT])
    assert "Yamada Tarou = 山田 太郎, ID" in pages(with_font)[0]
    assert made.SOPInstanceUID != with_font.SOPInstanceUID


def test_control_characters_become_spaces() -> None:
    made = report(image(ramp(), StudyDescription="one\ttwo"))
    assert "one two" in pages(made)[0]


def test_unreadable_font(tmp_path: Path) -> None:
    path = tmp_path / "none.ttf"
    for content in (None, b"nonsense"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidArgument, match=r"the font .*none\.ttf cannot be read") as wrong:
            report(image(ramp()), fonts=[path])
        assert wrong.value.field == "pdf_fonts"


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fpdf" else found(name))
    with pytest.raises(InvalidArgument, match=r"pip install 'camserve\[pdf\]'"):
        report(image(ramp()))


def test_configuration_of_the_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(f'pdf_fonts = ["{LAST_RESORT}"]\n{MINIMAL}\n[[rules]]\noutputs = ["pdf"]\n')
    read(path).check_files()
    path.write_text('pdf_fonts = ["none.ttf"]\n' + MINIMAL)
    with pytest.raises(ConfigError, match=r"^pdf_fonts: the font .*/none\.ttf cannot be read"):
        read(path).check_files()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fpdf" else found(name))
    path.write_text(MINIMAL + '\n[[rules]]\noutputs = ["pdf"]\n')
    with pytest.raises(ConfigError, match=r"^rules\.0\.outputs: pdf, which needs the package fpdf2"):
        read(path)
