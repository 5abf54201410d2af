"""Types of values in the configuration of the gateway."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from camserve.addresses import require_host_port

__all__ = ["Address", "Url"]

Address = Annotated[str, AfterValidator(require_host_port)]


def _require_url(url: str) -> str:
    """Return the URL unchanged if it can be parsed; urlsplit raises ValueError otherwise."""
    _ = urlsplit(url).port
    return url


Url = Annotated[str, Field(pattern="^https?://.+$"), AfterValidator(_require_url)]
