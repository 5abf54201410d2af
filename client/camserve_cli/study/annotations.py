"""Annotations of images: their targets, and the boxes and masks that show where the targets are."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar
from xml.etree import ElementTree

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from camserve.errors import InvalidArgument

__all__ = ["Box", "read_boxes", "read_labels", "read_mask"]

T = TypeVar("T")
# Left, top, right, bottom, in pixels of the upright image. Right and bottom are exclusive.
Box: TypeAlias = tuple[float, float, float, float]

_BOX = ("file", "left", "top", "right", "bottom")
_LABEL = ("file", "target")


def read_labels(path: Path, images: Sequence[Path]) -> list[str]:
    """Read the target of each image from a CSV file.

    Args:
        path: CSV file with the columns file and target. The header line is optional. A file is named by its path
            relative to the folder of the CSV file, or by its name alone.
        images: The images.

    Returns:
        A class index or a label for each image.

    Raises:
        OSError: The file cannot be read.
        InvalidArgument: A line has another form, or an image has no target or several.
    """
    targets: list[str] = []
    for image, found in zip(images, _values_by_image(path, images, _LABEL, lambda cells: cells[0]), strict=True):
        if len(found) != 1:
            count = f"{len(found)} different targets" if found else "no target"
            raise InvalidArgument(f"{path} has {count} for {image}; expected exactly one")
        targets += found
    return targets


def read_boxes(path: Path, images: Sequence[Path]) -> list[list[Box]]:
    """Read the boxes around the target of each image.

    Args:
        path: CSV file with the columns file, left, top, right and bottom, in pixels, and one line for each box. The
            header line is optional, and files are named as in `read_labels`. Alternatively, a folder of Pascal VOC
            files, in which IMAGE.xml describes IMAGE.jpg.
        images: The images.

    Returns:
        One or more boxes for each image.

    Raises:
        OSError: A file cannot be read.
        InvalidArgument: A file has another form, or an image has no box.
    """
    if path.is_dir():
        boxes_of_images = [_voc(path / f"{image.stem}.xml") for image in images]
    else:
        boxes_of_images = _values_by_image(path, images, _BOX, _box)
    for image, boxes in zip(images, boxes_of_images, strict=True):
        if not boxes:
            raise InvalidArgument(f"{path} has no box for {image}; expected at least one", field="truth")
    return boxes_of_images


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read a mask from an image file.

    Returns:
        Booleans [H, W], true for pixels that are not black.

    Raises:
        OSError: The file cannot be read.
    """
    with PIL.Image.open(path) as file:
        return np.asarray(file.convert("L")) > 0


def _values_by_image(
    path: Path, images: Sequence[Path], columns: Sequence[str], read: Callable[[list[str]], T]
) -> list[list[T]]:
    """Parse the lines of each image and return its distinct values."""
    by_path: dict[Path, dict[T, None]] = {}
    by_name: dict[str, dict[T, None]] = {}
    for line, (name, *cells) in _lines(path, columns):
        try:
            value = read(cells)
            place = (path.parent / name).resolve()
        except ValueError:  # of a number, or of a name with NUL
            raise InvalidArgument(
                f"{path}, line {line}: {','.join([name, *cells])!r} does not have the form {','.join(columns)}"
            ) from None
        by_path.setdefault(place, {})[value] = None
        by_name.setdefault(Path(name).name, {})[value] = None
    return [list(by_path.get(image.resolve()) or by_name.get(image.name, {})) for image in images]


def _lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in _rows(reader, path):
            cells = [cell.strip() for cell in row]
            if not any(cells) or (reader.line_num == 1 and [cell.lower() for cell in cells] == list(columns)):
                continue
            if len(cells) != len(columns) or not all(cells):
                raise InvalidArgument(
                    f"{path}, line {reader.line_num}: {','.join(row)!r} does not have the form {','.join(columns)}"
                )
            yield reader.line_num, cells


def _rows(reader: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not a CSV file in UTF-8: {error}") from error


def _box(cells: list[str]) -> Box:
    left, top, right, bottom = map(float, cells)
    return left, top, right, bottom


def _voc(path: Path) -> list[Box]:
    """Read the boxes of all objects in a Pascal VOC file, in which pixels count from 1 and ends are inclusive."""
    try:
        boxes = ElementTree.parse(path).iterfind("object/bndbox")
        sides = [[float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: of an unknown encoding
        raise InvalidArgument(f"{path} is not a Pascal VOC file: {error}", field="truth") from error
    return [(max(left - 1, 0), max(top - 1, 0), right, bottom) for left, top, right, bottom in sides]
