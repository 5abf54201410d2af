"""The web server of the page: who may use it, what it accepts, and what it logs."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest

import camserve
from camserve import aio
from camserve.errors import InvalidArgument
from camserve_server.service.server import Server
from camserve_ui import colour_maps, image_files, problems, requests, streams, web_server
from tests.browser import CHROMIUM
from tests.client.fake_server import RAMP
from tests.dicom.samples import SECRETS
from tests.http2 import wait_until
from tests.processes import CAMSERVE, LIMIT_S, ROOT, completed, environment, started
from tests.ui.conftest import Fake

CAT = Path(image_files.__file__).parent / "examples" / "cat.jpg"


def request(
    url: str, method: str, path: str, body: bytes = b"", /, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT_S)
    try:
        connection.request(
            method, path, body or None, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def post(url: str, path: str, fields: object, content: bytes = b"") -> tuple[int, Any]:
    status, _, answer = request(url, "POST", path, json.dumps(fields).encode() + b"\n" + content)
    return status, json.loads(answer.splitlines()[-1])


# ---- access ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:8050", "host.example:8050", "unix:80"])
def test_addresses_that_other_machines_can_reach_are_refused(listen: str) -> None:
    with pytest.raises(InvalidArgument, match="neither TLS nor a login"):
        web_server.run(aio.Client(), listen)


@pytest.mark.parametrize("listen", ["localhost", "8050", "127.0.0.1:x", "::1:8050"])
def test_malformed_addresses_are_refused(listen: str) -> None:
    with pytest.raises(InvalidArgument, match="is not HOST:PORT"):
        web_server.run(aio.Client(), listen)


@pytest.mark.slow
def test_command_reports_wrong_addresses() -> None:
    ran = completed([*CAMSERVE, "ui", "--no-browser", "--listen", "0.0.0.0:0"])
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: other machines can reach 0.0.0.0:0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = completed([*CAMSERVE, "ui", "--no-browser", "--listen", f"127.0.0.1:{port}"])
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another address with --listen\n"
    )


@pytest.mark.slow
def test_option_permits_other_addresses_and_interrupt_ends_the_command() -> None:
    command = [*CAMSERVE, "ui", "--no-browser", "--insecure", "--listen", "0.0.0.0:0"]
    with started(command, env=environment()) as process:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("camserve ui is ready on ").strip()
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert request(url, "GET", "/", Host="images.example")[0] == 200
        assert request(url, "GET", "/", Host="images.example", Origin="http://images.example")[0] == 200
        assert request(url, "GET", "/", Host="images.example", Origin="http://other.example")[0] == 403
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_browser_in_the_terminal_can_read_the_page(tmp_path: Path) -> None:
    """Such a browser runs until the user leaves it."""
    script, read = tmp_path / "browser.py", tmp_path / "read.html"
    script.write_text(
        "import sys, urllib.request\n"
        f"page = urllib.request.urlopen(sys.argv[1], timeout={LIMIT_S}).read()\n"
        f"open({str(read)!r}, 'wb').write(page)\n"
    )
    variables = environment(BROWSER=f"{sys.executable} {script} %s")
    with started([*CAMSERVE, "ui", "--listen", "127.0.0.1:0"], env=variables):
        wait_until(lambda: read.exists() and b"<title>camserve</title>" in read.read_bytes())


@pytest.mark.slow
def test_other_pages_cannot_use_the_server(fake: Fake) -> None:
    url = fake.ui.url
    own = urlsplit(url).netloc
    for headers in (
        {"Host": "attacker.example"},
        {"Host": "unix:80"},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ):
        for path in ("/", "/api/models", "/page/main.js"):
            status, answered, _ = request(url, "GET", path, b"", **headers)
            assert status == 403
            assert "access-control-allow-origin" not in answered
    status, answered, _ = request(url, "GET", "/", Origin=f"http://{own}")
    assert status == 200
    policy = answered["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert answered["cross-origin-resource-policy"] == "same-origin"
    assert answered["cache-control"] == "no-store"
    assert "server" not in answered
    assert request(url, "GET", "/page/%2e%2e/app.py")[0] == 404


@pytest.mark.slow
def test_malformed_requests_are_refused(fake: Fake) -> None:
    form = {"model": "first", "methods": ["opti-cam"], "target": "", "budget": None, "seed": 0}
    for path, fields, field in (
        ("/api/explain", [], ""),
        ("/api/explain", form | {"target": "\ud800"}, ""),
        ("/api/explain", form | {"methods": []}, "methods"),
        ("/api/explain", form | {"methods": "opti-cam"}, "methods"),
        ("/api/explain", form | {"budget": "many"}, "budget"),
        ("/api/explain", form | {"seed": 1.5}, "seed"),
        ("/api/evaluate", {"model": "first", "target": 1, "height": 9, "width": 9}, ""),
        ("/api/evaluate", {"model": "first", "target": 1, "height": -1, "width": 9}, ""),
        ("/api/replay", {"receipt": "{}"}, "receipt"),
        ("/api/replay", {"receipt": "[" * 100_000}, "receipt"),
    ):
        status, answer = post(fake.ui.url, path, fields, b"image")
        assert (status, answer["problem"]["field"], answer["problem"]["code"]) == (400, field, "INVALID_ARGUMENT")
    for body in (b"\xff", b"[" * 100_000):
        assert request(fake.ui.url, "POST", "/api/explain", body)[0] == 400
    assert request(fake.ui.url, "GET", "/api/explain")[0] == 405
    assert not fake.servicer.requests


@pytest.mark.slow
def test_large_files_are_refused(fake: Fake) -> None:
    status, answer = post(fake.ui.url, "/api/image", {}, CAT.read_bytes() + bytes(65 << 20))
    assert (status, answer["problem"]["field"]) == (400, "image")
    assert answer["problem"]["title"] == "The image or the result is too large."
    status, answer = post(fake.ui.url, "/api/explain", {}, bytes(128 << 20))
    assert (status, answer["problem"]["field"]) == (400, "image")
    assert "larger than 128 MiB" in answer["problem"]["detail"]


def test_bugs_are_logged_without_data(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError(SECRETS["PatientName"])
    except ValueError as error:
        streams.log_failure(error)
    assert "ValueError" in caplog.text and "test_web_server.py" in caplog.text
    assert SECRETS["PatientName"] not in caplog.text


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_dicom_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "dicom_is_installed", lambda: False)
    with pytest.raises(InvalidArgument, match=r"pip install 'camserve\[ui,dicom\]'"):
        image_files.load(bytes(128) + b"DICM", {})
    with pytest.raises(InvalidArgument, match="expected JPEG, PNG, WebP, BMP, GIF or TIFF "):
        image_files.load(b"x" * 200, {})
    assert image_files.load(CAT.read_bytes(), {}).width == 451


def test_large_compressed_images_are_refused_without_a_warning() -> None:
    """A decompression bomb is reported like a file that cannot be read."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    size = (60_000).to_bytes(4)
    header = chunk(b"IHDR", size + size + bytes([8, 0, 0, 0, 0]))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    with pytest.raises(InvalidArgument, match="not an image that can be read"):
        image_files.load(bomb, {})


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("", None),
        (" ", None),
        ("0", 0),
        ("281", 281),
        ("tabby, cat", "tabby, cat"),
        ("-1", "-1"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_targets_are_read(text: str, target: object) -> None:
    assert requests.ExplainForm.read({"methods": ["cam"], "target": text}).target == target


def test_maps_are_read_from_the_beginning_of_a_body() -> None:
    saliency, rest = requests.read_map({"height": 8, "width": 8}, RAMP.astype("<f4").tobytes() + b"image")
    assert np.array_equal(saliency, RAMP)
    assert rest == b"image"


def test_each_error_has_a_title_and_a_sentence() -> None:
    kinds: list[type[camserve.CamserveError]] = [
        camserve.CamserveError,
        *camserve.CamserveError.__subclasses__(),
        camserve.TooLarge,
    ]
    for kind in kinds:
        problem = problems.describe(kind("something is wrong"))
        assert problem["title"].endswith(".")
        assert problem["detail"] == "Something is wrong."
    internal = problems.internal(ValueError("Wintersohn"))
    assert "Wintersohn" not in str(internal) and "ValueError" in internal["detail"]


def test_colour_maps_have_256_colours() -> None:
    for name, colours in colour_maps.COLOUR_MAPS.items():
        assert colours.shape == (256, 3) and colours.dtype == np.uint8, name
    lightness = {name: each @ [0.2126, 0.7152, 0.0722] for name, each in colour_maps.COLOUR_MAPS.items()}
    assert all((np.diff(lightness[name]) > -1).all() for name in ("Default", "Viridis", "Grey"))


# ---- documentation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_script_takes_the_screenshot(server: Server, tmp_path: Path) -> None:
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    script, out = ROOT / "examples" / "ui_picture.py", tmp_path / "ui.jpg"
    ran = completed([sys.executable, str(script), "--address", server.address, "--budget", "200", "--out", str(out)])
    assert ran.returncode == 0, ran.stderr
    with PIL.Image.open(out) as picture, PIL.Image.open(ROOT / "docs" / "images" / "ui.jpg") as committed:
        assert picture.size == committed.size
    assert (ROOT / "docs" / "images" / "ui.jpg").stat().st_size < 250_000
