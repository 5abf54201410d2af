"""`make demo` in its quick form: it writes images and a page, and it stops its server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import uuid
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest

from tests.processes import LIMIT_S, completed, environment, started

# The embedded network with small images, and with a batch size, so that the server does not measure it when it starts.
MODELS = (
    '[{"name": "efficientnet-lite0", "source": "embedded:efficientnet-lite0", "input_size": [128, 128], '
    '"batch_size": 8}]'
)
DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def mark() -> str:
    """Return a value of the environment variable by which `children` finds the processes of one test."""
    return f"camserve-test-{uuid.uuid4()}"


def children(marker: str) -> set[str]:
    """Return the ids of the running processes that inherited the environment variable CAMSERVE_TEST_MARKER."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"CAMSERVE_TEST_MARKER={marker}" in variables:
            found.add(process.name)
    return found


class Page(HTMLParser):
    """Images of a page, and all addresses to which it refers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.links += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.images.append(attributes)


@pytest.mark.slow
def test_demo_writes_images_and_a_page_and_stops_its_server(tmp_path: Path) -> None:
    marker = mark()
    variables = environment(CAMSERVE_TEST_MARKER=marker, CAMSERVE_MODELS=MODELS)
    ran = completed([sys.executable, DEMO, "--quick", "--out", tmp_path], env=variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Egyptian cat" in ran.stdout
    assert children(marker) == set()

    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["chelsea.grad-cam.png", "chelsea.opti-cam.png", "chelsea.poly-cam.png"]
    for name in names:
        with PIL.Image.open(tmp_path / name) as image:
            assert image.size == (451, 300)

    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == 6, "the photograph, three maps and two levels"
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert all(link.startswith("data:") for link in page.links)
    assert not re.findall(r"https?://|url\(|@import", text)
    assert str(tmp_path) not in text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find processes")
def test_interrupted_demo_stops_its_server(tmp_path: Path) -> None:
    marker = mark()
    command: list[str | Path] = [sys.executable, DEMO, "--quick", "--out", tmp_path]
    variables = environment(CAMSERVE_TEST_MARKER=marker, CAMSERVE_MODELS=MODELS)
    with started(command, stdout=subprocess.DEVNULL, env=variables) as demo:

        def has_answered_grad_cam() -> bool:
            return demo.poll() is not None or any(
                call.get("rpc") == "ExplainStream" and call.get("code") == "OK" for call in log(tmp_path)
            )

        # Grad-CAM is by far the quickest of the three requests, so the other two are running when it is answered.
        end = time.monotonic() + LIMIT_S
        while not has_answered_grad_cam() and time.monotonic() < end:
            time.sleep(0.1)
        assert demo.poll() is None, "the demo is still running"
        assert children(marker) - {str(demo.pid)}, "the demo runs a server of its own"
        demo.send_signal(signal.SIGINT)
        assert demo.wait(timeout=LIMIT_S) == 130
    assert children(marker) == set()


def log(folder: Path) -> list[dict[str, object]]:
    """Return the complete lines of the server's log."""
    path = folder / "server.log"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{")]
