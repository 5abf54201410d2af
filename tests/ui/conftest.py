"""Fixtures of the tests of the page: a browser, and `camserve ui` for a real and for a fake server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from camserve_server.service.server import Server
from tests.browser import launched
from tests.client.conftest import authority, certificate
from tests.client.fake_server import RAMP, Servicer, listening
from tests.processes import CAMSERVE, LIMIT_S, environment, started

__all__ = ["authority", "certificate"]

expect.set_options(timeout=1000 * LIMIT_S)  # the default of 5 s is too short for a slow machine


@dataclass
class Running:
    """A `camserve ui` process.

    Attributes:
        url: The address of the page.
        log: The file of its standard error stream.
        temporary: The folder for its temporary files.
    """

    url: str
    log: Path
    temporary: Path


@contextmanager
def running_ui(address: str, folder: Path, *options: str, **variables: str) -> Iterator[Running]:
    """Start `camserve ui` for the server at an address, yield it when it is ready, and kill it at the end."""
    temporary = folder / "temporary"
    temporary.mkdir()
    command = [*CAMSERVE, "ui", "--address", address, "--listen", "127.0.0.1:0", "--no-browser", *options]
    variables = {"TMPDIR": str(temporary), **variables}
    with (
        (folder / "ui.log").open("w", encoding="utf-8") as stderr,
        started(command, stderr=stderr, env=environment(**variables)) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = re.fullmatch(r"camserve ui is ready on (http://127\.0\.0\.1:\d+/)\n", line)
        assert ready, line + (folder / "ui.log").read_text(encoding="utf-8")
        yield Running(ready[1], folder / "ui.log", temporary)


@dataclass
class Visit:
    """Tab of a browser, its requests, and its errors and messages."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def status(self, text: str) -> None:
        """Wait until the page reports a status."""
        self.page.locator("#status", has_text=text).wait_for(timeout=1000 * LIMIT_S)

    def example(self, name: str = "cat") -> None:
        """Open an example."""
        self.page.get_by_role("button", name=name).click()
        self.status("The image is loaded. Choose methods")

    def select_methods(self, *names: str) -> None:
        """Select these methods and no others, when the page shows those of the model."""
        expect(self.page.locator("#methods")).to_have_attribute("aria-busy", "false")
        for box in self.page.locator("#methods input").all():
            box.set_checked(box.get_attribute("value") in names)

    def explain(self, *methods: str) -> None:
        """Explain the image with methods, and wait for the end."""
        self.select_methods(*methods)
        self.page.get_by_role("button", name="Explain", exact=True).click()
        # A text would also match "Grad-CAM is finished."
        self.page.locator("#status", has_text=re.compile("^Finished")).wait_for(timeout=1000 * LIMIT_S)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run Chromium."""
    with launched() as browser:
        yield browser


def visit(browser: Browser, url: str, **options: object) -> Visit:
    """Open the page in a new tab that shares nothing with others, and wait until it is connected."""
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(1000 * LIMIT_S)
    opened = Visit(page)
    page.on("request", lambda request: opened.requests.append(request.url))
    page.on("console", lambda message: opened.messages.append(message.text))
    page.on("pageerror", lambda error: opened.messages.append(str(error)))
    page.goto(url)
    page.locator("#server-text", has_text="Connected to").wait_for()
    return opened


@pytest.fixture(scope="module")
def ui(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Run `camserve ui` for the real server."""
    with running_ui(server.address, tmp_path_factory.mktemp("ui")) as running:
        yield running


@pytest.fixture
def tab(browser: Browser, ui: Running) -> Iterator[Visit]:
    """Open the page for the real server."""
    opened = visit(browser, ui.url, permissions=["clipboard-read", "clipboard-write"])
    yield opened
    opened.page.context.close()


@dataclass
class Fake:
    """A fake server and `camserve ui` for it."""

    servicer: Servicer
    ui: Running


@pytest.fixture(scope="module")
def fake_ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """Run `camserve ui` for a fake server."""
    servicer = Servicer()
    with listening(servicer) as address, running_ui(address, tmp_path_factory.mktemp("fake")) as running:
        yield Fake(servicer, running)


@pytest.fixture
def fake(fake_ui: Fake) -> Fake:
    """The fake server, which does not fail and has received nothing."""
    fake_ui.servicer.before = lambda context: None
    fake_ui.servicer.saliency = RAMP
    fake_ui.servicer.requests.clear()
    return fake_ui


@pytest.fixture
def fake_tab(browser: Browser, fake: Fake) -> Iterator[Visit]:
    """Open the page for the fake server."""
    opened = visit(browser, fake.ui.url)
    yield opened
    opened.page.context.close()
