"""Files with images: which files of a folder are inputs of a bulk run, and of which kinds they are."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from camserve.errors import InvalidArgument

__all__ = ["EXPECTED", "SUFFIXES", "Kind", "escaped", "find_files", "kind_of", "name_of_non_image", "scores_folder"]

Kind: TypeAlias = Literal["file", "dicom", "tar", "parquet"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_COMPRESSED = (
    *(f".tar.{each}" for each in ("gz", "bz2", "xz", "zst", "lz4", "lzma", "z")),
    *(".tgz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"),
)
EXPECTED = f"images ({', '.join(SUFFIXES)}), DICOM files, Parquet files (.parquet) or archives (.tar)"
_NAMED = 3  # archives in a warning

log = logging.getLogger(__name__)


def find_files(path: Path, out: Path | None) -> list[Path]:
    """Return the files of a folder and its subfolders that contain images, or the path itself if it is no folder."""
    if not path.is_dir():
        return [path]
    files = sorted(_walk(path, out))
    if packed := [escaped(each) for each in files if each.name.lower().endswith(_COMPRESSED)]:
        named = ", ".join(packed[:_NAMED]) + (", ..." if len(packed) > _NAMED else "")
        log.warning(
            "left out compressed archives, %d in all: %s; decompress them, and run the command again",
            len(packed),
            named,
        )
    found = [each for each in files if _is_input(each)]
    if not found:
        raise InvalidArgument(f"{path} contains no images; expected {EXPECTED}", field="image")
    return found


def _walk(root: Path, out: Path | None) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders. A link that leads nowhere is a file that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error  # otherwise the images of an unreadable folder would be missing without a message

    seen = set() if out is None else {os.path.realpath(scores_folder(out))}
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        for name in names:
            path = Path(folder, name)
            if path.is_file() or not path.exists():
                yield path


def scores_folder(out: Path) -> Path:
    """Return the folder of the scores in an output folder."""
    return out / "scores"


def _is_input(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, ".parquet", ".tar") or _is_dicom(path)


def kind_of(path: Path) -> Kind:
    """Return the kind of a file by its name, or by its first bytes. Every other file counts as an image file."""
    match path.suffix.lower():
        case ".parquet":
            return "parquet"
        case ".tar":
            return "tar"
        case _ if path.name.lower().endswith(_COMPRESSED):
            return "tar"  # which is refused
        case suffix if suffix not in SUFFIXES and _is_dicom(path):
            return "dicom"
    return "file"


def _is_dicom(path: Path) -> bool:
    """Return True for a file with an extension of DICOM, or with no extension and the preamble of PS3.10."""
    suffix = path.suffix.lower()
    # Identifiers such as 1.2.840.10008 are common names of DICOM files. Their last part is not an extension.
    if suffix and not suffix[1:].isdigit():
        return suffix in DICOM_SUFFIXES
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def name_of_non_image(path: Path) -> str:
    """Return the name of the kind of a DICOM file that is no image, such as a report; empty for other files.

    It is empty for damaged files too, so that they are errors of the output.
    """
    from camserve_dicom.object_classes import name_of_non_image
    from camserve_dicom.part10 import read_sop_class
    from camserve_dicom.reading import silence_library_warnings

    silence_library_warnings()
    try:
        return name_of_non_image(read_sop_class(path))
    except OSError:
        return ""


def escaped(path: Path | str) -> str:
    """Return a path, or a text with one, as it appears in the output, with undecodable bytes escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()
