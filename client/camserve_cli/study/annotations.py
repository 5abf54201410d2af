"""What is known of images beforehand: their targets, and where those are."""

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
# Left, top, right, bottom, in pixels of the upright image; right and bottom behind the last pixel.
Box: TypeAlias = tuple[float, float, float, float]

_BOX = ("file", "left", "top", "right", "bottom")
_LABEL = ("file", "target")


def read_labels(path: Path, images: Sequence[Path]) -> list[str]:
    """The target of each image out of a CSV of file and target, with or without these two as its first line.

    A file is named by its path from the CSV's folder, or by its name alone. Raises OSError, and InvalidArgument for a
    line of another form or an image that has no target or several.
    """
    targets: list[str] = []
    for image, found in zip(images, _of_images(path, images, _LABEL, lambda cells: cells[0]), strict=True):
        if len(found) != 1:
            raise InvalidArgument(f"{path} has {'several targets' if found else 'no target'} for {image}")
        targets += found
    return targets


def read_boxes(path: Path, images: Sequence[Path]) -> list[list[Box]]:
    """Where the target of each image is: out of a CSV, a line for each box, or out of a folder of Pascal VOC files.

    The CSV has file, left, top, right, bottom, with or without these as its first line, and names files as that of
    `read_labels` does. In the folder IMAGE.jpg is described by IMAGE.xml. Raises OSError, and InvalidArgument for
    anything else or an image without a box.
    """
    if path.is_dir():
        found = [_voc(path / f"{image.stem}.xml") for image in images]
    else:
        found = _of_images(path, images, _BOX, _box)
    for image, boxes in zip(images, found, strict=True):
        if not boxes:
            raise InvalidArgument(f"{path} has no box for {image}", field="truth")
    return found


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A picture as booleans [H, W]: true where it is not black. Raises OSError."""
    with PIL.Image.open(path) as file:
        return np.asarray(file.convert("L")) > 0


def _of_images(
    path: Path, images: Sequence[Path], columns: Sequence[str], read: Callable[[list[str]], T]
) -> list[list[T]]:
    """For each image what is read of its lines in the CSV, each once."""
    by_path: dict[Path, dict[T, None]] = {}
    by_name: dict[str, dict[T, None]] = {}
    for line, (name, *cells) in _lines(path, columns):
        try:
            value = read(cells)
        except ValueError:
            raise InvalidArgument(
                f"{path}, line {line}: expected {','.join(columns)}, not {name},{','.join(cells)}"
            ) from None
        by_path.setdefault((path.parent / name).resolve(), {})[value] = None
        by_name.setdefault(Path(name).name, {})[value] = None
    return [list(by_path.get(image.resolve()) or by_name.get(image.name, {})) for image in images]


def _lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (reader.line_num == 1 and [cell.lower() for cell in cells] == list(columns)):
                continue
            if len(cells) != len(columns) or not all(cells):
                raise InvalidArgument(
                    f"{path}, line {reader.line_num}: expected {','.join(columns)}, not {','.join(row)!r}"
                )
            yield reader.line_num, cells


def _box(cells: list[str]) -> Box:
    left, top, right, bottom = map(float, cells)
    return left, top, right, bottom


def _voc(path: Path) -> list[Box]:
    """The boxes of all objects. There, pixels count from 1 and the last ones are inside."""
    try:
        boxes = ElementTree.parse(path).iterfind("object/bndbox")
        sides = [[float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidArgument(f"{path} is no Pascal VOC file: {error}", field="truth") from error
    return [(max(left - 1, 0), max(top - 1, 0), right, bottom) for left, top, right, bottom in sides]
