"""HTTP responses that the gateway must not trust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from camserve_dicom.gateway import http_requests, pacs
from camserve_dicom.gateway.http_requests import HttpDestination
from camserve_dicom.gateway.workers import TemporaryFailure


@contextmanager
def answering(content: bytes, announced: int) -> Iterator[HttpDestination]:
    """Run a server that announces a length and sends a content, and yield it as a destination."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield HttpDestination(f"http://127.0.0.1:{server.server_port}/", None, None, 30.0)
        finally:
            server.shutdown()
            thread.join()


def test_response_is_read_up_to_its_length() -> None:
    with answering(b"[]", 2) as destination:
        assert destination.post(b"{}", {}).body == b"[]"


@pytest.mark.parametrize("sent", [0, 5], ids=["nothing", "a part"])
def test_lost_connection_is_temporary(sent: int) -> None:
    """Half of an image or of a status list must not count as the whole."""
    with answering(b"x" * sent, 10) as destination, pytest.raises(TemporaryFailure, match="no connection"):
        destination.request("POST", "/", b"{}", {}, 100)


def test_response_must_be_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "MAX_SMALL_BYTES", 10)
    with answering(b"x" * 11, 11) as destination, pytest.raises(TemporaryFailure, match="more than 10 bytes"):
        destination.post(b"{}", {})


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"00081198": {"Value": [{"00081155": {"Value": ["1.2"]}, "00081197": {"Value": [1e999]}}]}}',
        b"[]",
        b'{"00081198": []}',
    ],
    ids=["nested", "infinite", "empty", "list"],
)
def test_malformed_status_list_has_no_status(body: bytes) -> None:
    assert pacs._parse_statuses(body) == {}
