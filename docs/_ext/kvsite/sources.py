"""Changes to a page as it is read, so that the file itself reads as well on a forge."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

from kvsite import navigation
from kvsite.files import page_of

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\1`*[ ]*$", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(
    r"<picture>.*?srcset=\"(?P<dark>[^\"]+)\".*?<img\s+alt=\"(?P<alt>[^\"]*)\"\s+src=\"(?P<light>[^\"]+)\".*?</picture>",
    re.DOTALL,
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def adapt(app: Sphinx, docname: str, content: list[str]) -> None:
    """Change the source of a page; Sphinx calls it with a list of one text."""
    path = Path(app.srcdir) / f"{docname}.md"
    if not path.is_file():
        return
    text = content[0]
    if docname == app.config.root_doc:
        text += navigation.toctrees()
    if docname == "results/README":
        text += navigation.results(path.parent)
    if docname == "methods":
        more = r"\1\n[All its parameters](reference/policies/\2.md)\n"
        text = re.sub(r"^(### ([\w.-]+)\n)", more, text, flags=re.MULTILINE)
    content[0] = "".join(part if fenced else _prose(part, docname) for fenced, part in split_fences(text))


def split_fences(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the parts of a text, with whether each is a fenced block."""
    end = 0
    for match in _FENCE.finditer(text):
        yield False, text[end : match.start()]
        yield True, match[0]
        end = match.end()
    yield False, text[end:]


def _prose(text: str, docname: str) -> str:
    text = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    text = _PICTURE.sub(_both, text)
    return LINK.sub(lambda found: _link(found, docname), text)


def _both(found: re.Match[str]) -> str:
    return "\n\n".join(
        f"```{{image}} {found[kind]}\n:class: only-{kind}\n:alt: {found['alt']}\n```" for kind in ("light", "dark")
    )


def _link(found: re.Match[str], docname: str) -> str:
    """Lead a link out of this folder to the page that shows that file."""
    path, anchor = found["path"], found["anchor"] or ""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(docname), path))
    return found[0] if target.startswith(("docs/", "/")) else f"](/{page_of(target)}.md{anchor})"
