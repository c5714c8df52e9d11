"""A real Chromium for tests of pages: what it logged, what it asked other hosts for, what axe-core says.

Tests that need it carry `needs_browser`, and are skipped, with a reason that the summary prints, where there is none.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
WIDE, PHONE = (1280, 900), (390, 844)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium (Debian's package chromium) or no playwright: pages are not tested in a browser",
)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium; one serves all tests of a module."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield started
        finally:
            started.close()


class Opened:
    """A page, in a session of its own, with what went wrong on it."""

    def __init__(
        self, browser: Browser, where: str | Path, size: tuple[int, int] = WIDE, dark: bool = False, **context: Any
    ):
        """`where` is a file or a URL; `context` goes to playwright's `new_context`."""
        url = Path(where).resolve().as_uri() if isinstance(where, Path) else where
        self.host = urlsplit(url).netloc
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", **context
        )
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)
        self.page.goto(url)

    def _dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != self.host:
            self.foreign.append(request.url)

    def check(self) -> None:
        """Nothing was logged as an error, no dialog opened, no other host was asked for anything."""
        assert not self.errors, self.errors
        assert not self.foreign, self.foreign

    def close(self) -> None:
        self.context.close()


def check_axe(page: Page) -> None:
    """axe-core finds no violation on the page as it stands."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"preload": False}).response["violations"]
    told = [f"{v['id']}: {v['help']} at {[node['target'] for node in v['nodes'][:3]]}" for v in found]
    assert not told, "\n".join(told)


def overflows(page: Page) -> bool:
    """Whether the page is wider than its window, so that a phone scrolls it sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def until(page: Page, expression: str) -> None:
    """Wait until some JavaScript is true; playwright's own `wait_for_function` needs what the page's rules forbid."""
    end = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"still not true: {expression}"
        page.wait_for_timeout(20)
