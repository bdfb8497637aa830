"""llms.txt, llms-full.txt, and the Markdown of each page beside it, for readers that are programs."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders.text import TextBuilder
from sphinx.writers.text import TextTranslator

from kvsite import navigation

ABOUT = (
    "KV-cache eviction methods as declared policies: YAML files over components (importance, redundancy, mixer, "
    "allocator, protection, selector, trigger), run in transformers' generate and in vLLM, compared in studies."
)
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_TREE = re.compile(r"^```\{toctree\}.*?^```\n?", re.MULTILINE | re.DOTALL)


def write(app: Sphinx) -> None:
    """Write everything beside the pages."""
    site, env = Path(app.outdir), app.env
    for name in sorted(env.found_docs):
        path = site / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(app, name), encoding="utf-8")
    sections = [f"# kvpolicy\n\n> {ABOUT}\n"]
    for caption, pages in navigation.SECTIONS.items():
        lines = [f"- [{title(app, page)}]({page}.md): {_first(app, page)}" for page in pages]
        sections.append(f"## {caption}\n\n" + "\n".join(lines) + "\n")
    (site / "llms.txt").write_text("\n".join(sections), encoding="utf-8")
    own = [page for pages in navigation.SECTIONS.values() for page in pages]
    full = [(site / f"{page}.md").read_text(encoding="utf-8") for page in ("index", *own)]
    (site / "llms-full.txt").write_text("\n\n".join(full), encoding="utf-8")


def title(app: Sphinx, page: str) -> str:
    """Return the title of a page."""
    return app.env.titles[page].astext()


def _text(app: Sphinx, name: str) -> str:
    source = Path(app.srcdir) / f"{name}.md"
    if source.is_file():
        return _TREE.sub("", _COMMENT.sub("", source.read_text(encoding="utf-8")))
    doctree = app.env.get_and_resolve_doctree(name, app.builder)
    builder = TextBuilder(app, app.env)
    builder.secnumbers = {}
    translator = TextTranslator(doctree, builder)
    doctree.walkabout(translator)
    return translator.body


def _first(app: Sphinx, page: str) -> str:
    """Return the first sentence of a page."""
    for paragraph in app.env.get_doctree(page).findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        return re.split(r"(?<=[.?:])\s", text, maxsplit=1)[0]
    return ""
