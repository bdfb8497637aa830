"""Pages are looked at in a real browser: headless Chromium, as a reader's, with nothing but the file."""

from __future__ import annotations

import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def missing(reason):
    """Skip where a browser is a convenience, fail where it is required, as in CI."""
    if os.environ.get("KVPOLICY_BROWSER") == "required":
        pytest.fail(f"KVPOLICY_BROWSER=required, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    """A running headless Chromium, as `playwright` drives it."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing(f"there is none of {', '.join(BROWSERS)} on the PATH; run scripts/browser.sh.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the package playwright is not installed; run `make setup`.")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, headless=True, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


class Opened:
    """A page that is open, and everything that went wrong with it.

    Attributes:
        page: playwright's page, with all that it can do.
        errors: console errors and uncaught exceptions.
        requests: what the page asked for, besides itself.
    """

    def __init__(self, browser, path, *, width, height=900, **context):
        self.errors = []
        self.requests = []
        self._context = browser.new_context(viewport={"width": width, "height": height}, **context)
        self.page = self._context.new_page()
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        url = path.resolve().as_uri()
        self.page.on("request", lambda request: self._asked(request.url, url))
        self.page.goto(url, wait_until="load")

    def _asked(self, address, own):
        if address.partition("#")[0] != own and not address.startswith(("data:", "blob:")):
            self.requests.append(address)

    def assert_clean(self):
        """No script failed, and nothing but the file itself was asked for."""
        assert self.errors == []
        assert self.requests == []

    def assert_fits(self):
        """The page as a whole does not scroll sideways."""
        content, window = self.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert content <= window, f"the page is {content} px wide in a window of {window} px"

    def close(self):
        self._context.close()


@pytest.fixture
def page_at(browser):
    """Return a function that opens a file at a width in px: `page_at(path, width=390)` returns an `Opened`."""
    opened = []

    def open_page(path, width=1280, **context):
        opened.append(Opened(browser, path, width=width, **context))
        return opened[-1]

    yield open_page
    for each in opened:
        each.assert_clean()
        each.close()
