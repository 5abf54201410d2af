"""Errors in plain words, with the field of the page that they belong to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from camserve.errors import (
    CamserveError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

__all__ = ["describe", "internal"]

# Fields of the page by the beginning of the name of the field in the request.
_FIELDS = {
    "image": "image",
    "source": "image",
    "regions": "image",
    "burned_in": "image",
    "non_image": "image",
    "frame": "frame",
    "model": "model",
    "targets": "target",
    "target": "target",
    "method": "methods",
    "budget": "budget",
    "seed": "seed",
    "metrics": "methods",
    "receipt": "receipt",
}

# What the user may do with a DICOM image that is refused, by reason: texts of buttons, and the options of
# `camserve_dicom.read` that they set.
_CHOICES: dict[str, dict[str, dict[str, str]]] = {
    "BURNED_IN_ANNOTATION": {"Use the image with its text": {"burned_in": "ignore"}},
    "ULTRASOUND_REGIONS": {
        "Use only the largest region": {"regions": "crop"},
        "Use the whole image": {"regions": "ignore"},
    },
    "NOT_AN_IMAGE": {"Use it as an image": {"non_image": "ignore"}},
}


def describe(error: CamserveError) -> dict[str, Any]:
    """Return an error as the page shows it.

    Args:
        error: An error of a call or of an image file.

    Returns:
        Object with the keys title, detail, remedy, field, choices, unavailable, code and request. `field` is the name
        of a field of the page, or empty. `unavailable` is True if the page should wait for the server.
    """
    title, remedy = _explain(error)
    field = "model" if isinstance(error, FailedPrecondition) else _field(error.field)
    return {
        "title": title,
        # Alternatives that the message names are arguments of Python functions. The page offers buttons instead.
        "detail": _sentence(re.sub(r';? ?\w+="\w+" [^;,]*,?', "", error.message)),
        "remedy": remedy,
        "field": field,
        "choices": [{"label": label, "options": each} for label, each in _CHOICES.get(error.reason, {}).items()],
        "unavailable": isinstance(error, Unavailable),
        "code": error.code.name,
        "request": error.request_id,
    }


def internal(error: BaseException) -> dict[str, Any]:
    """Return a bug of this package as the page shows it. Its message may contain data of the user."""
    return describe(CamserveError("")) | {
        "title": "The page's web server has failed.",
        "detail": f"The cause is a {type(error).__name__}; the log of camserve ui says where it occurred.",
        "remedy": "Please report this bug.",
    }


def _field(name: str) -> str:
    return _FIELDS.get(re.split(r"[.\[]", name)[0], "")


def _sentence(text: str) -> str:
    """Return the text with a capital letter, unless it begins with a name such as poly-cam, and with a full stop."""
    begins_with_word = re.match(r"[a-z]+[ ,]", text) is not None
    return f"{text[:1].upper() if begins_with_word else text[:1]}{text[1:].rstrip('. ')}." if text else ""


def _explain(error: CamserveError) -> tuple[str, str]:
    """Return a title and a remedy."""
    return next(explain(error) for kind, explain in _KINDS.items() if isinstance(error, kind))


def _busy(error: CamserveError) -> tuple[str, str]:
    if error.retry_after_s is None:
        return "The server does not have enough memory for this request.", "Try another method, or a smaller model."
    wait = max(1, round(error.retry_after_s))
    return (
        "The server is busy: its queue is full.",
        f"Try again in about {wait} second{'s' if wait > 1 else ''}, choose fewer methods, or limit the rows.",
    )


def _unavailable(error: CamserveError) -> tuple[str, str]:
    if error.reason == "INTERRUPTED":
        return "The connection to the server was lost.", "Explain the image again when the server is available."
    return "The server is not available.", "Check that it runs. The page connects again by itself."


def _not_found(error: CamserveError) -> tuple[str, str]:
    if _field(error.field) == "model":
        return "The server does not have this model.", "Choose another model."
    return "The server does not know this name.", "Reload the page, which then shows what the server offers."


def _invalid(error: CamserveError) -> tuple[str, str]:
    titles = {
        "image": "The image cannot be used.",
        "frame": "The image does not have this frame.",
        "target": "The model does not have this class.",
        "budget": "The limit of rows is too small.",
        "receipt": "The receipt cannot be replayed.",
    }
    return titles.get(_field(error.field), "The request is invalid."), ""


def _always(title: str, remedy: str) -> Callable[[CamserveError], tuple[str, str]]:
    return lambda error: (title, remedy)


# The first class that fits counts.
_KINDS: dict[type[CamserveError], Callable[[CamserveError], tuple[str, str]]] = {
    TooLarge: _always("The image or the result is too large.", "Use a smaller image."),
    ResourceExhausted: _busy,
    Unavailable: _unavailable,
    NotFound: _not_found,
    InvalidArgument: _invalid,
    FailedPrecondition: _always("The model cannot do this.", "Choose another method or another model."),
    DeadlineExceeded: _always(
        "The server did not finish in time.", "Limit the rows, or start camserve ui with a longer --timeout."
    ),
    Cancelled: _always("The request was cancelled.", ""),
    Unauthenticated: _always(
        "The server does not accept the credentials.", "Start camserve ui with --token-file or a client certificate."
    ),
    PermissionDenied: _always("The credentials do not permit this.", "Ask the operator of the server for more rights."),
    CamserveError: _always("The server has failed.", "Give the operator of the server the request id."),
}
