"""Other ways in and out of the gateway: TLS, and STOW-RS."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from camserve_dicom.gateway.config import Config
from camserve_server.service.server import Server
from tests.dicom.gateways import RULE, Spooled, opened
from tests.dicom.pacs import Pacs, image, send, until

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


def context(ca: trustme.CA, protocol: int, *, shown: bool = True) -> ssl.SSLContext:
    """Of a modality or a PACS, with a certificate of the CA if one is to be shown."""
    made = ssl.SSLContext(protocol)
    made.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(made)
    if shown:
        ca.issue_cert("localhost", "127.0.0.1").configure_cert(made)
    return made


def files(ca: trustme.CA, folder: Path) -> dict[str, Path]:
    """What `[tls]` names."""
    mine = ca.issue_cert("localhost", "127.0.0.1")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    mine.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    mine.private_key_pem.write_to_path(str(folder / "key.pem"))
    return {"certificate": folder / "cert.pem", "key": folder / "key.pem", "ca": folder / "ca.pem"}


def test_tls_both_ways(tmp_path: Path, tiny: Server, ca: trustme.CA) -> None:
    pacs = Pacs()
    pacs.up(context(ca, ssl.PROTOCOL_TLS_SERVER))
    config = Config(
        spool=tmp_path / "spool",
        listen="127.0.0.1:0",
        callers=["MODALITY"],
        min_free_bytes=0,
        tls=files(ca, tmp_path),
        server={"address": tiny.address},
        pacs={"ae_title": "PACS", "address": pacs.address, "tls": True},
        rules=[RULE],
    )
    try:
        with opened(config) as running:
            host, _, port = running.address.partition(":")
            # Who connects and says nothing does not keep others waiting.
            with socket.create_connection((host, int(port))):
                mutual = context(ca, ssl.PROTOCOL_TLS_CLIENT)
                assert send(running.address, image(), tls=(mutual, "127.0.0.1")) == [0]
                until(lambda: "committed" in running.events())
            assert send(running.address, image(1)) == []
            nobody = context(ca, ssl.PROTOCOL_TLS_CLIENT, shown=False)
            assert send(running.address, image(1), tls=(nobody, "127.0.0.1")) == []
            stranger = context(trustme.CA(), ssl.PROTOCOL_TLS_CLIENT)
            ca.configure_trust(stranger)
            assert send(running.address, image(1), tls=(stranger, "127.0.0.1")) == []
            assert running.idle()
    finally:
        pacs.down()
    assert len(pacs.kept) == 1


class Web:
    """DICOMweb's STOW-RS, which answers what it is told to. `came` holds what was posted, with its headers."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.came: list[tuple[dict[str, str], bytes]] = []
        self.url = ""


@pytest.fixture
def web() -> Iterator[Web]:
    found = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.came.append(({**self.headers}, body))
            status, said = found.answers.pop(0)
            instance = body[body.index(b"2.25.") :].split(b"\0")[0].decode()
            answer = json.dumps(said).replace("INSTANCE", instance).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/dicom-web/studies"
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def said(sequence: str, reason: str, value: int) -> dict[str, Any]:
    """DICOM JSON: an item of the sequence with the reason, for the object that was posted."""
    instance = {"vr": "UI", "Value": ["INSTANCE"]}
    return {sequence: {"vr": "SQ", "Value": [{"00081155": instance, reason: {"vr": "US", "Value": [value]}}]}}


@contextmanager
def storing(tmp_path: Path, tiny: Server, web: Web) -> Iterator[Spooled]:
    (tmp_path / "authorization").write_text("Bearer open-sesame\n")
    config = Config(
        spool=tmp_path / "spool",
        listen="127.0.0.1:0",
        callers=["MODALITY"],
        min_free_bytes=0,
        server={"address": tiny.address},
        pacs={"stow_url": web.url, "stow_authorization_file": tmp_path / "authorization"},
        rules=[RULE],
    )
    with opened(config) as running:
        assert send(running.address, image()) == [0]
        yield running


@pytest.mark.parametrize(
    "answers",
    [
        [(503, {}), (200, {})],
        [(409, said("00081198", "00081197", 0xA700)), (202, said("00081199", "00081196", 0xB000))],
        [(409, said("00081198", "00081197", 0x0111))],
    ],
    ids=["stored", "with a warning", "there already"],
)
def test_stow_stores_in_the_end(tmp_path: Path, tiny: Server, web: Web, answers: list[tuple[int, Any]]) -> None:
    web.answers = [*answers]
    with storing(tmp_path, tiny, web) as running:
        until(lambda: "stored" in running.events() and running.idle())
        assert running.dead() == []
    assert len(web.came) == len(answers)
    for headers, body in web.came:
        assert headers["Authorization"] == "Bearer open-sesame"
        assert headers["Content-Type"].startswith('multipart/related; type="application/dicom"; boundary=')
        boundary = headers["Content-Type"].partition("boundary=")[2]
        assert body.startswith(f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode())
        assert body.endswith(f"\r\n--{boundary}--\r\n".encode())
    assert len({body.split(b"\r\n\r\n", 1)[1].rpartition(b"\r\n--")[0] for _, body in web.came}) == 1, "the same bytes"


@pytest.mark.parametrize(
    ("status", "answer", "reason"),
    [
        (400, {}, "HTTP 400"),
        (409, {}, "HTTP 409; the archive gave no reason"),
        (202, said("00081198", "00081197", 0x0110), "status 0x0110"),
    ],
)
def test_stow_is_given_up(tmp_path: Path, tiny: Server, web: Web, status: int, answer: Any, reason: str) -> None:
    web.answers = [(status, answer)]
    with storing(tmp_path, tiny, web) as running:
        until(running.dead)
        assert running.dead()[0]["reason"] == reason
