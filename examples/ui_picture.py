"""Take the screenshot of docs/ui.md: `make ui-picture`.

The script starts a server with the embedded network and `camserve ui`, and operates the page in Chromium. It takes a
few minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import demo
from playwright.sync_api import Page, expect, sync_playwright
from rich.console import Console

OUT = Path(__file__).parent.parent / "docs" / "images" / "ui.jpg"
METHODS = ("poly-cam", "opti-cam", "grad-cam")
# Limit for each step, in milliseconds. Poly-CAM takes some minutes on a slow machine.
LIMIT_MS = 900_000
SIZE = {"width": 1440, "height": 1130}


def main() -> int:
    """Take the screenshot and return the exit status."""
    parser = argparse.ArgumentParser(description="Take the screenshot of the page of camserve ui.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="JPEG file of the screenshot")
    parser.add_argument("--address", metavar="HOST:PORT", help="address of a running server instead of a new one")
    parser.add_argument("--budget", type=int, metavar="ROWS", help="limit of rows for each method")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("error: Chromium is not installed", file=sys.stderr)
        return 1
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        address = options.address or stack.enter_context(demo.serving(log, Console()))
        url = stack.enter_context(page_server(address))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        page.set_default_timeout(LIMIT_MS)
        expect.set_options(timeout=LIMIT_MS)
        page.goto(url)
        explain(page, options.budget)
        page.screenshot(path=options.out, type="jpeg", quality=80)
        browser.close()
    return 0


@contextmanager
def page_server(address: str) -> Iterator[str]:
    """Run `camserve ui` for a server.

    Args:
        address: The address of the server.

    Yields:
        The URL of the page. The process is stopped at the end of the block.
    """
    command = [sys.executable, "-m", "camserve_cli", "ui", "--address", address, "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--no-browser"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None, "stdout is a pipe"
            yield process.stdout.readline().rpartition(" ")[2].strip()
        finally:
            process.terminate()


def explain(page: Page, budget: int | None) -> None:
    """Explain the photograph of the cat with all methods, and measure the maps."""
    status = page.locator("#status")
    page.get_by_role("button", name="cat").click()
    expect(status).to_contain_text("The image is loaded. Choose methods")
    for box in page.locator("#methods input").all():
        box.set_checked(box.get_attribute("value") in METHODS)
    if budget is not None:
        page.get_by_text("More options").click()
        page.get_by_label("Limit of rows for each method").fill(str(budget))
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(status).to_contain_text("Finished")
    page.get_by_role("button", name="Measure all maps").click()
    expect(page.locator(".outcome", has_text="Measured with")).to_have_count(len(METHODS))
    page.evaluate("scrollTo(0, 0)")


if __name__ == "__main__":
    sys.exit(main())
