"""`make demo`, in its quick form: it leaves pictures and a page behind, and no server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def servers() -> set[str]:
    """Processes of `camserve serve` on a free port, by id."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if command[1:] == ["-m", "camserve_cli", "serve", "--listen", "127.0.0.1:0", ""]:
            found.add(process.name)
    return found


class Page(HTMLParser):
    """Gathers images and all addresses that the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.images.append(given)


@pytest.mark.slow
def test_the_demo_leaves_pictures_and_a_page_and_no_server(tmp_path: Path) -> None:
    before = servers()
    ran = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Egyptian cat" in ran.stdout
    assert servers() <= before

    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["chelsea.grad-cam.png", "chelsea.opti-cam.png", "chelsea.poly-cam.png"]
    for name in pictures:
        with PIL.Image.open(tmp_path / name) as picture:
            assert picture.size == (451, 300)

    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == 6  # the photograph, three maps, two levels
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert all(link.startswith("data:") for link in page.links)
    assert not re.findall(r"https?://|url\(|@import", text)
    assert str(tmp_path) not in text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_demo_that_is_interrupted_stops_its_server(tmp_path: Path) -> None:
    before = servers()
    with subprocess.Popen([sys.executable, str(DEMO), "--out", str(tmp_path)], stdout=subprocess.DEVNULL) as demo:
        try:
            until = time.monotonic() + 120
            while '"ready"' not in log(tmp_path) and time.monotonic() < until:
                time.sleep(0.2)
            assert servers() - before, "it has a server of its own"
            time.sleep(1)  # in the middle of the work
            os.kill(demo.pid, signal.SIGINT)
            assert demo.wait(timeout=30) == 130
        finally:
            demo.kill()
    assert servers() <= before


def log(folder: Path) -> str:
    path = folder / "server.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""
