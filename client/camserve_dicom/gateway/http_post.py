"""HTTP requests of the gateway: POST to a PACS or a webhook."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from camserve_dicom.gateway.workers import TemporaryFailure

__all__ = ["TEMPORARY_STATUSES", "HttpDestination", "Response"]

# An operator may renew credentials that have expired. All statuses from 500 are temporary, too.
TEMPORARY_STATUSES = (401, 403, 408, 425, 429)


class Response(NamedTuple):
    """Status, body and Retry-After of a response, in seconds."""

    status: int
    body: bytes
    retry_after_s: float | None

    @property
    def is_temporary(self) -> bool:
        """True if the same request may succeed later."""
        return self.status in TEMPORARY_STATUSES or self.status >= 500


class HttpDestination:
    """A URL that receives POST requests. Redirects are not followed.

    Args:
        url: An http or https URL.
        ca: A PEM file with the CAs of its certificate. The default is those of the system.
        authorization: A file with the value of the Authorization header. It is read for each request.
        timeout_s: Seconds to connect, and for each part of the response.
    """

    def __init__(self, url: str, ca: Path | None, authorization: Path | None, timeout_s: float) -> None:
        self._url, self._authorization, self._timeout_s = urlsplit(url), authorization, timeout_s
        self._context = ssl.create_default_context(cafile=ca) if self._url.scheme == "https" else None

    def post(self, body: bytes, headers: dict[str, str]) -> Response:
        """Send a request and return the response.

        Raises:
            TemporaryFailure: If there is no response.
            OSError: If the file of the Authorization header cannot be read.
        """
        if self._authorization is not None:
            headers = {**headers, "Authorization": self._authorization.read_text().strip()}
        host, port = self._url.hostname or "", self._url.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            if self._context is None
            else http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._context)
        )
        target = f"{self._url.path or '/'}{'?' if self._url.query else ''}{self._url.query}"
        try:
            connection.request("POST", target, body, headers)
            response = connection.getresponse()
            wait = response.getheader("Retry-After", "")
            return Response(response.status, response.read(), float(wait) if wait.isdecimal() else None)
        except (OSError, http.client.HTTPException) as error:
            raise TemporaryFailure(f"no connection to {host}") from error
        except ValueError:  # it has the value of the header, which must not get into reason.json
            raise TemporaryFailure("the Authorization header has characters that are not allowed") from None
        finally:
            connection.close()
