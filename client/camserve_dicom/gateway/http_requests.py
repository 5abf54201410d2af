"""HTTP requests of the gateway to a PACS, a webhook or a worklist."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from camserve_dicom.gateway.workers import TemporaryFailure

__all__ = ["TEMPORARY_STATUSES", "HttpDestination", "Response", "TooLarge"]

# An operator may renew credentials that have expired. All statuses from 500 are temporary, too.
TEMPORARY_STATUSES = (401, 403, 408, 425, 429)
# Responses to results, messages and workitems are small. A larger one is refused, so that it does not fill the memory.
MAX_SMALL_BYTES = 16 << 20
MAX_RETRY_AFTER_S = 3600.0  # another system must not stop the gateway for days


class Response(NamedTuple):
    """A response.

    Attributes:
        status: HTTP status.
        body: Its body.
        retry_after_s: Seconds of Retry-After, if the response has this header, but at most `MAX_RETRY_AFTER_S`.
        content_type: Content-Type.
    """

    status: int
    body: bytes
    retry_after_s: float | None
    content_type: str = ""

    @property
    def is_success(self) -> bool:
        """True if the status is from 200 to 299."""
        return 200 <= self.status < 300

    @property
    def is_temporary(self) -> bool:
        """True if the same request may succeed later."""
        return self.status in TEMPORARY_STATUSES or self.status >= 500


class TooLarge(Exception):
    """A response whose body exceeds the permitted size."""


class HttpDestination:
    """A URL that receives requests. Redirects are not followed.

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
        """Send a POST request to the URL and return the response, see `request`."""
        target = f"{self._url.path or '/'}{'?' if self._url.query else ''}{self._url.query}"
        try:
            return self.request("POST", target, body, headers, MAX_SMALL_BYTES)
        except TooLarge as error:
            raise TemporaryFailure(str(error)) from error

    def request(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str], max_bytes: int
    ) -> Response:
        """Send a request to the host of the URL and return the response.

        Args:
            method: HTTP method.
            target: Path and query.
            body: Body of the request.
            headers: Headers of the request.
            max_bytes: Maximum size of the body of the response.

        Raises:
            TemporaryFailure: If there is no complete response.
            TooLarge: If the body of the response has more than `max_bytes`.
            OSError: If the file of the Authorization header cannot be read.
        """
        if self._authorization is not None:
            # Any bytes are valid Latin-1, the character set of headers.
            headers = {**headers, "Authorization": self._authorization.read_bytes().strip().decode("latin-1")}
        host, port = self._url.hostname or "", self._url.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            if self._context is None
            else http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._context)
        )
        try:
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            data = response.read(max_bytes + 1)
            if len(data) <= max_bytes and response.length:  # `read` with a limit does not notice a lost connection
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException) as error:
            raise TemporaryFailure(f"no connection to {host}") from error
        except ValueError:  # it has the value of the header, which must not get into reason.json
            raise TemporaryFailure("the Authorization header has characters that are not allowed") from None
        finally:
            connection.close()
        if len(data) > max_bytes:
            raise TooLarge(f"the response has more than {max_bytes} bytes")
        wait = response.getheader("Retry-After", "")
        retry_after_s = min(float(wait), MAX_RETRY_AFTER_S) if wait.isdecimal() else None
        return Response(response.status, data, retry_after_s, response.getheader("Content-Type", ""))
