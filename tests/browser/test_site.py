"""The documentation site, built as `make docs` does and served from this machine, as a reader's browser shows it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "index.html", "quick-start.html", "from-kvpress.html", "methods.html", "models.html", "results/README.html",
    "reference/policies/rkv-density.html", "reference/components/importance.html", "reference/api/kvpolicy.html",
    "reference/commands.html", "write-a-kernel.html",
)  # fmt: skip


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def site():
    """Build what has changed; return the address of the site."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-P", "-m", "sphinx", "-W", "-q", "-d", "build/doctrees", "docs", "build/docs"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(ROOT / "build" / "docs")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser, site):
    """Return a function that opens a page of the site; nothing may fail, and nothing be asked for from elsewhere."""
    contexts, faults = [], []

    def visit(name, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"{name}: {error}"))
        page.on("console", lambda said: faults.append(f"{name}: {said.text}") if said.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith((site, "data:")) else faults.append(asked.url))
        page.goto(site + name, wait_until="load")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


def test_search_finds_a_page_and_a_name(visit):
    page = visit("index.html")
    page.fill("input[name=q]", "prompt pinning")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results ul.search li a")
    assert any("pinn" in text.lower() or "FAQ" in text for text in page.locator("ul.search li a").all_inner_texts())
    page = visit("search.html?q=PolicyCache")
    page.wait_for_selector("ul.search li a[href*='reference/api/kvpolicy.runtimes.hf.html']")


def test_dark_mode_follows_the_reader_and_the_button(visit):
    background = "getComputedStyle(document.body).backgroundColor"

    def light(page):
        return sum(map(int, page.evaluate(background).removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128

    assert light(visit("concepts.html", color_scheme="light"))
    page = visit("concepts.html", color_scheme="dark")
    assert not light(page)
    assert page.locator("img.only-dark").is_visible()
    assert not page.locator("img.only-light").is_visible()
    for _ in range(3):  # auto, light, dark
        page.locator(".theme-toggle-content button, .theme-toggle-header button").locator("visible=true").first.click()
        if light(page):
            break
    assert light(page)
    assert page.locator("img.only-light").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_no_page_scrolls_sideways(visit, name, width):
    page = visit(name, width)
    content, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert content <= window, f"{name} is {content} px wide in a window of {window} px"


def test_the_menu_opens_on_a_telephone(visit):
    page = visit("index.html", 390)
    link = page.locator(".sidebar-tree a", has_text="Write a policy").first
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator("label.nav-overlay-icon, .nav-overlay-icon label").locator("visible=true").first.click()
    page.wait_for_function("document.querySelector('.sidebar-drawer').getBoundingClientRect().x >= 0")


def test_programs_find_markdown(site):
    from urllib.request import urlopen

    def text(name):
        with urlopen(site + name) as answer:
            return answer.read().decode()

    listed = text("llms.txt")
    assert listed.startswith("# kvpolicy\n\n> ")
    assert "(serving.md)" in listed
    assert text("reference/policies/rkv.md").startswith("# rkv\n")
    assert "PolicyCache" in text("reference/api/kvpolicy.runtimes.hf.md")
    assert "## Coming from kvpress" in text("llms-full.txt") or "# Coming from kvpress" in text("llms-full.txt")
