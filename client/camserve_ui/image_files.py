"""Image files that a user opens in the page. With the extra `dicom`, they may be DICOM files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import PIL.Image

from camserve.errors import InvalidArgument
from camserve.images import check_size, upright_rgb
from camserve_ui.loaded_image import LoadedImage, preview

__all__ = ["UNREADABLE", "dicom_is_installed", "load"]

UNREADABLE = "UNREADABLE_IMAGE"
# The formats that the camserve server reads.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Position and value of the prefix of DICOM files (PS3.10 7.1).
_PREFIX_AT, _PREFIX = slice(128, 132), b"DICM"


def dicom_is_installed() -> bool:
    """Return True if the packages of the extra `dicom` are installed."""
    try:
        import camserve_ui.dicom_files  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("camserve"):
            raise
        return False
    return True


def load(content: bytes, options: Mapping[str, Any]) -> LoadedImage:
    """Read an image file.

    Args:
        content: The file: JPEG, PNG, WebP, BMP, GIF, TIFF or, with the extra `dicom`, DICOM.
        options: Keyword arguments of `camserve_dicom.read`. They have no effect on other files.

    Returns:
        The image with its preview.

    Raises:
        InvalidArgument: The file is not an image that can be explained, or the DICOM image is refused.
        TooLarge: The file is larger than a request may be.
    """
    if not content:
        raise InvalidArgument("the file is empty; choose an image file", field="image")
    if content[_PREFIX_AT] == _PREFIX:
        if not dicom_is_installed():
            raise InvalidArgument(
                "this is a DICOM file, and DICOM support is not installed; install it with: "
                "pip install 'camserve[ui,dicom]', and start camserve ui again",
                field="image",
            )
        return _load_dicom(content, options)
    try:
        picture = _decode(content)
    except InvalidArgument as error:
        if not dicom_is_installed():
            raise
        try:
            return _load_dicom(content, options)  # A DICOM file may lack the prefix.
        except InvalidArgument as refusal:
            raise error if refusal.reason in ("NOT_DICOM", "TRUNCATED") else refusal from None
    check_size(len(content), "the file")
    return LoadedImage(picture.width, picture.height, preview(picture))


def _load_dicom(content: bytes, options: Mapping[str, Any]) -> LoadedImage:
    from camserve_ui import dicom_files

    return dicom_files.load(content, options)


def _decode(content: bytes) -> PIL.Image.Image:
    try:
        with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as file:
            return upright_rgb(file)
    except Exception as error:  # Pillow raises many types for corrupt files, and their messages may quote the file.
        raise InvalidArgument(
            f"the file is not an image that can be read; expected JPEG, PNG, WebP, BMP, GIF or TIFF"
            f"{', or DICOM' if dicom_is_installed() else ''}",
            field="image",
            reason=UNREADABLE,
        ) from error
