"""What can be wrong with a DICOM object."""

from __future__ import annotations

from camserve.errors import InvalidArgument

__all__ = ["DicomError"]


class DicomError(InvalidArgument):
    """A source that cannot be explained as it is; `reason` is a constant for programs. Messages hold nothing of it.

    NOT_DICOM, TRUNCATED, NO_PIXELS, FRAME_OUT_OF_RANGE, BURNED_IN_ANNOTATION, ULTRASOUND_REGIONS,
    UNSUPPORTED_TRANSFER_SYNTAX, UNREADABLE_PIXELS, UNSUPPORTED_PIXELS, BROKEN_HEADER,
    INCOMPLETE (an attribute is missing that results need), OWN_RESULT (camserve has made it), UNWRITABLE_RESULT.
    """

    def __init__(self, message: str, reason: str, *, field: str = "source") -> None:
        super().__init__(message, reason=reason, field=field)
