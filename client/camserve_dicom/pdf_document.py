"""The pages of the PDF report: text in any script, tables and pictures, with the same bytes for the same content."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distribution
from pathlib import Path
from typing import Self

import PIL.Image
from fontTools.ttLib import TTFont
from fpdf import FPDF
from fpdf.enums import Align, XPos, YPos
from fpdf.fonts import TTFFont

from camserve.errors import InvalidArgument
from camserve_dicom.overlay import WARNING

__all__ = ["REPLACEMENT", "PDFDocument"]

REPLACEMENT = "\u25a1"
"""Character that replaces those that no font has: a white square."""

_MARGIN_MM, _LINE_MM, _GAP_MM = 15.0, 4.6, 4.0
_FONT_PT, _SMALL_PT, _HEADING_PT = 9.0, 7.5, 11.5
_BLACK, _GREY, _YELLOW = (0, 0, 0), (90, 90, 90), (255, 240, 190)
# Pictures are at most about 90 mm wide, so more pixels would not be visible in print at 300 dpi.
_MAX_PICTURE_PX, _MAX_PICTURE_MM = 1100, 95.0
_FONTS = "matplotlib/mpl-data/fonts/ttf"


class PDFDocument(FPDF):
    """A document in A4 with the intended use and the identification of the patient on each page.

    It is a context manager that closes the font files.

    Args:
        identification: The patient, at the top of each page.
        footer: Text at the bottom of each page.
        fonts: Further font files, for characters that DejaVu Sans does not have.
        created: Creation date of the document.

    Raises:
        InvalidArgument: If a font cannot be read.

    Attributes:
        missing: True if a text had a character that no font has.
    """

    def __init__(self, identification: str, footer: str, fonts: Sequence[Path], created: datetime) -> None:
        super().__init__(format="A4")
        self.missing = False
        self._covered: set[int] = set()
        folder = Path(str(distribution("matplotlib").locate_file(_FONTS)))
        for style, name in (("", "DejaVuSans.ttf"), ("B", "DejaVuSans-Bold.ttf")):
            self.add_font("dejavu", style, folder / name)
        fallbacks = [f"fallback{number}" for number, _ in enumerate(fonts)]
        for family, path in zip(fallbacks, fonts, strict=True):
            self._add_fallback(family, path)
        self.set_fallback_fonts(fallbacks, exact_match=False)
        for font in self.fonts.values():
            if isinstance(font, TTFFont):
                self._covered |= set(font.cmap)
        self.set_text_shaping(True)  # joins Arabic letters, and orders right-to-left scripts
        self.set_creation_date(created.replace(tzinfo=UTC))
        self.set_title("camserve report")
        self.set_lang("en")
        self.set_margins(_MARGIN_MM, _MARGIN_MM)
        self.set_auto_page_break(True, _MARGIN_MM + 5)
        self._identification, self._footer = self.clean(identification), self.clean(footer)
        self.add_page()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the font files, which fpdf2 leaves open."""
        for font in self.fonts.values():
            if isinstance(font, TTFFont):
                font.ttfont.close()

    def _add_fallback(self, family: str, path: Path) -> None:
        try:
            TTFont(path, fontNumber=0).close()  # fpdf2 would leave a file open that it cannot read
            self.add_font(family, "", path)
        except Exception as error:  # a corrupt font can raise any exception in the parser
            self.__exit__()
            raise InvalidArgument(
                f"the font {path} cannot be read; expected a TrueType or OpenType file", field="pdf_fonts"
            ) from error

    def clean(self, text: str) -> str:
        """Return a text in which spaces replace control characters, and a square those that no font has."""
        characters = [
            each if each.isprintable() or each == "\n" else " " for each in unicodedata.normalize("NFC", text)
        ]
        missing = {each for each in characters if ord(each) not in self._covered and each != "\n"}
        self.missing = self.missing or bool(missing)
        return "".join(REPLACEMENT if each in missing else each for each in characters)

    def header(self) -> None:
        """Write the intended use and the patient at the top of a page."""
        self.set_fill_color(*_YELLOW)
        self.set_font("dejavu", "B", _FONT_PT)
        self.cell(0, 7, WARNING, align=Align.C, fill=True, new_x=XPos.LMARGIN, new_y=YPos.NEXT)
        self.set_font("dejavu", "", _FONT_PT)
        self.multi_cell(0, _LINE_MM + 1, self._identification, align=Align.L, new_x=XPos.LMARGIN, new_y=YPos.NEXT)
        self.ln(2)

    def footer(self) -> None:
        """Write the document's identification and the page number at the bottom of a page."""
        self.set_y(-_MARGIN_MM)
        self.set_font("dejavu", "", _SMALL_PT)
        self.set_text_color(*_GREY)
        self.cell(0, _LINE_MM, f"{self._footer}, page {self.page_no()} of {{nb}}", align=Align.C)
        self.set_text_color(*_BLACK)

    def heading(self, text: str) -> None:
        """Write a heading, on the page of the next lines."""
        self._break_page_unless(6 * _LINE_MM)
        self.ln(1.5)
        self.set_font("dejavu", "B", _HEADING_PT)
        self.multi_cell(0, 7, self.clean(text), align=Align.L, new_x=XPos.LMARGIN, new_y=YPos.NEXT)

    def paragraph(self, text: str, *, bold: bool = False) -> None:
        """Write a paragraph."""
        self.set_font("dejavu", "B" if bold else "", _FONT_PT)
        self.multi_cell(0, _LINE_MM, self.clean(text), align=Align.L, new_x=XPos.LMARGIN, new_y=YPos.NEXT)
        self.ln(1)

    def rows(self, values: Mapping[str, str]) -> None:
        """Write a table of names and values. Rows with an empty value are left out."""
        cleaned = {self.clean(name): self.clean(value) for name, value in values.items() if value}
        self.set_font("dejavu", "", _FONT_PT)
        width_mm = min(max(map(self.get_string_width, cleaned), default=0.0) + 5, self.epw / 2)
        for name, value in cleaned.items():
            self._break_page_unless(2 * _LINE_MM)
            self.set_text_color(*_GREY)
            self.cell(width_mm, _LINE_MM, name)
            self.set_text_color(*_BLACK)
            self.multi_cell(0, _LINE_MM, value, align=Align.L, new_x=XPos.LMARGIN, new_y=YPos.NEXT)

    def pictures(self, pictures: Mapping[str, PIL.Image.Image]) -> None:
        """Write pictures of the same size side by side, each with a caption below it."""
        width_mm = (self.epw - _GAP_MM) / 2
        first = next(iter(pictures.values()))
        self.ln(1)
        height_mm = width_mm * first.height / first.width
        if height_mm > _MAX_PICTURE_MM:
            width_mm, height_mm = width_mm * _MAX_PICTURE_MM / height_mm, _MAX_PICTURE_MM
        self._break_page_unless(height_mm + 3 * _LINE_MM)
        top, bottom = self.y, self.y
        for number, (caption, picture) in enumerate(pictures.items()):
            left = _MARGIN_MM + number * ((self.epw - _GAP_MM) / 2 + _GAP_MM)
            self.image(_reduced(picture), left, top, width_mm, height_mm)
            self.set_font("dejavu", "", _SMALL_PT)
            self.set_xy(left, top + height_mm + 1)
            self.multi_cell((self.epw - _GAP_MM) / 2, _LINE_MM - 0.8, self.clean(caption), align=Align.L)
            bottom = max(bottom, self.y)
        self.set_xy(_MARGIN_MM, bottom + 1)

    def colour_scale(self, colours: PIL.Image.Image, low: str, high: str) -> None:
        """Write a colour scale with the texts of its ends."""
        self._break_page_unless(2 * _LINE_MM)
        self.set_font("dejavu", "", _SMALL_PT)
        self.cell(self.get_string_width(low) + 3, _LINE_MM, low)
        self.image(colours, self.x, self.y + 0.8, 60, 3)
        self.set_x(self.x + 61)
        self.cell(0, _LINE_MM, high, new_x=XPos.LMARGIN, new_y=YPos.NEXT)

    def note_missing_characters(self) -> None:
        """Write what the replacement character means, if a text has one."""
        if self.missing:
            self.ln(1)
            self.paragraph(
                f"The character {REPLACEMENT} replaces characters that the fonts of this report do not have; set "
                "pdf_fonts to a font that has them."
            )

    def _break_page_unless(self, height_mm: float) -> None:
        """Begin a new page unless this height is left on the current one."""
        if self.will_page_break(height_mm):
            self.add_page()


def _reduced(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return the picture with at most _MAX_PICTURE_PX on its longer side."""
    reduced = picture.copy()
    reduced.thumbnail((_MAX_PICTURE_PX, _MAX_PICTURE_PX), PIL.Image.Resampling.LANCZOS)
    return reduced
