"""Image files of a study and their names in its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from camserve.errors import InvalidArgument

__all__ = ["find_images", "image_names"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Replace each folder by its image files.

    Args:
        paths: Files and folders.

    Returns:
        The files in their order, without duplicates. The files of a folder are sorted by name.

    Raises:
        InvalidArgument: A folder contains no image files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
            if not inside:
                raise InvalidArgument(
                    f"{path} contains no image files; expected names that end with {', '.join(SUFFIXES)}",
                    field="image",
                )
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def image_names(images: Iterable[Path]) -> list[str]:
    """Return the names of images in the files of a study: their paths, with undecodable bytes escaped."""
    return [str(path).encode("utf-8", "backslashreplace").decode() for path in images]
