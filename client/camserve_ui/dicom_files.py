"""DICOM files in the page. Of the file, only rendered pixels reach the page and the camserve server.

The module needs the extra `dicom`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import PIL.Image

import camserve_dicom
from camserve.images import check_size
from camserve_dicom.contrast import is_constant, saturation_warnings
from camserve_ui.loaded_image import LoadedImage, base64_text, preview

__all__ = ["load"]

# Pydicom and highdicom would quote values of headers in the log.
camserve_dicom.silence_library_warnings()


def load(content: bytes, options: Mapping[str, Any]) -> LoadedImage:
    """Render one frame of a DICOM file.

    Args:
        content: The file.
        options: Keyword arguments of `camserve_dicom.read`: frame, regions, burned_in and non_image.

    Returns:
        The pixels that `camserve dicom explain` would send.

    Raises:
        DicomError: The file is not a supported image, or is refused.
        TooLarge: The pixels are too large for a request.
    """
    known = {name: options[name] for name in ("frame", "regions", "burned_in", "non_image") if name in options}
    image = camserve_dicom.read(io.BytesIO(content), **known)
    pixels = camserve_dicom.request_pixels(image)
    picture = PIL.Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    check_size(file.tell(), "the image")
    constant = ("the image is constant: all pixels have the same value, so no map can be meaningful",)
    return LoadedImage(
        picture.width,
        picture.height,
        preview(picture),
        pixels=base64_text(file.getvalue()),
        dicom=True,
        frame=image.frame,
        frames=int(image.source.get("NumberOfFrames") or 1),
        notes=image.steps,
        warnings=constant if is_constant(pixels) else saturation_warnings(pixels),
    )
