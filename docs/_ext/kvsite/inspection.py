"""A look at the site that was built: every link leads somewhere, and no page asks for anything from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

_logger = logging.getLogger(__name__)
_LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "srcset", "audio": "src", "video": "src"}


class Page(HTMLParser):
    """What a page refers to, and what of it can be referred to.

    Attributes:
        links: addresses that a reader may follow.
        loaded: addresses that the page asks for by itself.
        anchors: names that may stand behind a `#`.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses and names of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag == "link" and "href" in values:
            (self.loaded if "stylesheet" in values.get("rel", "") else self.links).add(values["href"])
        if _LOADED.get(tag) in values:
            self.loaded.add(values[_LOADED[tag]])


def faults(site: Path) -> list[str]:
    """Return a sentence for each link that leads nowhere and each thing that is asked for from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where}: asks for {each}" for each in sorted(page.loaded) if _elsewhere(each)]
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if _elsewhere(link) or parts.scheme in ("mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{where}: the link {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: the link {link} leads to no place of its page")
    return found


def _elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def report(site: Path) -> None:
    """Warn of all faults, which ends a build in which warnings are errors."""
    for fault in faults(site):
        _logger.warning(fault)
