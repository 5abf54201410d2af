"""Errors in DICOM objects."""

from __future__ import annotations

import re

from camserve.errors import InvalidArgument

__all__ = ["DicomError", "with_options"]


class DicomError(InvalidArgument):
    """A DICOM object that cannot be explained, or a result that cannot be written.

    The message quotes no value of the header, so it can be logged. `reason` is a constant for programs:

    - `NOT_DICOM`: the file does not begin like a DICOM file.
    - `TRUNCATED`: the file ends too early, or cannot be parsed.
    - `NO_PIXELS`: the object has no pixel data, or is a DICOMDIR.
    - `NOT_AN_IMAGE`: the pixels are not an image, but a segmentation, a dose or a map.
    - `FRAME_OUT_OF_RANGE`: the image has no frame of this number.
    - `BURNED_IN_ANNOTATION`: Burned In Annotation is YES.
    - `ULTRASOUND_REGIONS`: the image has ultrasound regions, or one lies outside of the image.
    - `UNSUPPORTED_TRANSFER_SYNTAX`: no installed package decodes the pixels.
    - `UNREADABLE_PIXELS`: the pixels are corrupt or truncated.
    - `UNSUPPORTED_PIXELS`: the pixels, a window or the overlay have a form that is not supported.
    - `BROKEN_HEADER`: an attribute or a lookup table has an invalid value.
    - `INCOMPLETE`: an attribute is missing that the results need.
    - `OWN_RESULT`: camserve has made the object.
    - `UNWRITABLE_RESULT`: the header or the explanation does not fit into a result.
    """

    def __init__(self, message: str, reason: str, *, field: str = "source") -> None:
        super().__init__(message, reason=reason, field=field)


def with_options(message: str) -> str:
    """Replace arguments of Python functions, such as regions="crop", by options of `camserve dicom explain`."""
    return re.sub(r'\b([a-z_]+)="([a-z_]+)"', lambda found: f"--{found[1].replace('_', '-')} {found[2]}", message)
