"""The gateway with TLS, and with a PACS that takes results by STOW-RS."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from camserve_dicom.gateway.config import Config
from camserve_server.service.server import Server
from tests.dicom.gateways import RULE, UNREACHABLE_SERVER, Spooled, config, opened
from tests.dicom.pacs import Pacs, image, send, wait_until
from tests.dicom.receivers import QuietHandler
from tests.processes import LIMIT_S, listening

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


def context(ca: trustme.CA, protocol: int, *, shown: bool = True) -> ssl.SSLContext:
    """Return the TLS context of a modality or a PACS, with a certificate of the CA if it is shown."""
    made = ssl.SSLContext(protocol)
    made.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(made)
    if shown:
        ca.issue_cert("localhost", "127.0.0.1").configure_cert(made)
    return made


def tls_files(ca: trustme.CA, folder: Path) -> dict[str, Path]:
    """Write the files of `[tls]`, and return their paths by key."""
    mine = ca.issue_cert("localhost", "127.0.0.1")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    mine.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    mine.private_key_pem.write_to_path(str(folder / "key.pem"))
    return {"certificate": folder / "cert.pem", "key": folder / "key.pem", "ca": folder / "ca.pem"}


@pytest.mark.slow
def test_tls_of_listener_and_pacs(tmp_path: Path, tiny: Server, ca: trustme.CA) -> None:
    pacs = Pacs()
    pacs.up(context(ca, ssl.PROTOCOL_TLS_SERVER))
    tls = tls_files(ca, tmp_path)
    given = config(tmp_path, tiny, pacs, tls=tls, pacs={"tls": True})
    try:
        with opened(given, pacs) as running:
            host, _, port = running.address.partition(":")
            # An idle connection does not block others.
            with socket.create_connection((host, int(port))):
                mutual = context(ca, ssl.PROTOCOL_TLS_CLIENT)
                assert send(running.address, image(), tls=(mutual, "127.0.0.1")) == [0]
                wait_until(lambda: "committed" in running.events())
            assert send(running.address, image(1)) == []
            anonymous = context(ca, ssl.PROTOCOL_TLS_CLIENT, shown=False)
            assert send(running.address, image(1), tls=(anonymous, "127.0.0.1")) == []
            stranger = context(trustme.CA(), ssl.PROTOCOL_TLS_CLIENT)
            ca.configure_trust(stranger)
            assert send(running.address, image(1), tls=(stranger, "127.0.0.1")) == []
            assert running.idle()
    finally:
        pacs.down()
    assert len(pacs.objects_by_uid) == 1


@pytest.mark.usefixtures("broken_associations")
def test_tls_connections_without_an_association(tmp_path: Path, tiny: Server, pacs: Pacs, ca: trustme.CA) -> None:
    """Peers that close, send no TLS, or are silent after the handshake do not block the gateway."""
    mutual = context(ca, ssl.PROTOCOL_TLS_CLIENT)
    given = config(tmp_path, tiny, pacs, tls=tls_files(ca, tmp_path), max_associations=1, server=UNREACHABLE_SERVER)
    with opened(given, pacs) as running, ExitStack() as stack:
        host, _, port = running.address.partition(":")
        for number in range(12):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=LIMIT_S))
            if number % 4 == 0:
                connection.close()
            elif number % 4 == 1:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            elif number % 4 == 2:
                stack.enter_context(mutual.wrap_socket(connection, server_hostname="127.0.0.1"))
        assert send(running.address, image(), tls=(mutual, "127.0.0.1")) == [0]


class Web:
    """A STOW-RS service with prepared responses.

    Attributes:
        responses: HTTP status and JSON body of the next responses.
        requests: Headers and body of each request.
        url: URL of the service.
    """

    def __init__(self) -> None:
        self.responses: list[tuple[int, Any]] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.url = ""


@pytest.fixture
def web() -> Iterator[Web]:
    """Run a STOW-RS service."""
    service = Web()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            service.requests.append(({**self.headers}, body))
            status, response = service.responses.pop(0)
            uid = re.search(rb"2\.25\.\d+", body)  # the first is Media Storage SOP Instance UID
            assert uid is not None
            content = json.dumps(response).replace("INSTANCE", uid[0].decode()).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        service.url = f"http://{address}/dicom-web/studies"
        yield service


def statuses(sequence: str, reason: str, value: int) -> dict[str, Any]:
    """Return a DICOM JSON response with a reason for the object of the request."""
    instance = {"vr": "UI", "Value": ["INSTANCE"]}
    return {sequence: {"vr": "SQ", "Value": [{"00081155": instance, reason: {"vr": "US", "Value": [value]}}]}}


@contextmanager
def gateway_with_stow(tmp_path: Path, tiny: Server, web: Web) -> Iterator[Spooled]:
    """Run a gateway that stores by STOW-RS, and send it an image."""
    (tmp_path / "authorization").write_text("Bearer open-sesame\n")
    destination = {"stow_url": web.url, "stow_authorization_file": tmp_path / "authorization"}
    given = Config.model_validate(
        {
            "spool": tmp_path / "spool",
            "listen": "127.0.0.1:0",
            "callers": ["MODALITY"],
            "min_free_bytes": 0,
            "server": {"address": tiny.address},
            "pacs": destination,
            "rules": [RULE],
        }
    )
    with opened(given) as running:
        assert send(running.address, image()) == [0]
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    "responses",
    [
        [(503, {}), (200, {})],
        [(409, statuses("00081198", "00081197", 0xA700)), (202, statuses("00081199", "00081196", 0xB000))],
        [(409, statuses("00081198", "00081197", 0x0111))],
    ],
    ids=["stored", "stored with a warning", "duplicate"],
)
def test_stow_stores_results(tmp_path: Path, tiny: Server, web: Web, responses: list[tuple[int, Any]]) -> None:
    web.responses = [*responses]
    with gateway_with_stow(tmp_path, tiny, web) as running:
        wait_until(lambda: "stored" in running.events() and running.idle())
        assert running.dead() == []
    assert len(web.requests) == len(responses)
    for headers, body in web.requests:
        assert headers["Authorization"] == "Bearer open-sesame"
        assert headers["Content-Type"].startswith('multipart/related; type="application/dicom"; boundary=')
        boundary = headers["Content-Type"].partition("boundary=")[2]
        assert body.startswith(f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode())
        assert body.endswith(f"\r\n--{boundary}--\r\n".encode())
    files = {body.split(b"\r\n\r\n", 1)[1].rpartition(b"\r\n--")[0] for _, body in web.requests}
    assert len(files) == 1, "the files are sent unchanged"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "response", "reason"),
    [
        (400, {}, "HTTP 400"),
        (409, {}, "HTTP 409; the archive gave no reason"),
        (202, statuses("00081198", "00081197", 0x0110), "status 0x0110"),
    ],
)
def test_stow_permanent_failures(
    tmp_path: Path, tiny: Server, web: Web, status: int, response: Any, reason: str
) -> None:
    web.responses = [(status, response)]
    with gateway_with_stow(tmp_path, tiny, web) as running:
        wait_until(running.dead)
        assert running.dead()[0]["reason"] == reason
