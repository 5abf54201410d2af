"""A browser for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.processes import LIMIT_S

__all__ = ["CHROMIUM", "contrast_ratios", "launched"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without these options, Chromium itself contacts other hosts.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def launched() -> Iterator[Browser]:
    """Start Chromium, yield it, and close it at the end. Skip the test if it is not installed."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=1000 * LIMIT_S)
        try:
            yield browser
        finally:
            browser.close()


def contrast_ratios(page: Page) -> list[float]:
    """Return the contrast between text and background of each visible element with text (WCAG 2.2, 1.4.3)."""
    ratios: list[float] = page.evaluate(
        """() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => x / 255)
              .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = (e) => {
            const colour = getComputedStyle(e).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" ? ground(e.parentElement) : colour;
          };
          return [...document.querySelectorAll("body *:not(svg *)")]
            .filter((e) => e.checkVisibility() && !e.closest(":disabled"))
            .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
            .map((e) => {
              const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
              return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
        }"""
    )
    return ratios
