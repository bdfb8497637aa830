"""What the site does otherwise than a forge that shows the same Markdown files.

- `navigation`: the order of the pages.
- `reference`: pages that are generated from the code into `reference/` before the build.
- `sources`: what is changed in a page as it is read: pictures for light and dark, links out of this folder.
- `inspection`: every link of the built site is followed, and nothing is asked for from elsewhere.
- `plain`: `llms.txt`, and the Markdown of each page beside it.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from kvsite import inspection, plain, reference, roles, sources

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything; Sphinx calls it."""
    app.add_role("kv", roles.CodeOrName(nodeclass=nodes.literal))
    app.connect("builder-inited", _generate)
    app.connect("source-read", sources.adapt)
    app.connect("missing-reference", roles.leave_as_code)
    app.connect("autodoc-process-docstring", roles.keep, priority=400)
    app.connect("autodoc-process-docstring", roles.give_back, priority=600)
    app.connect("autodoc-skip-member", roles.skip)
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": _version()}


def _version() -> int:
    """Return a number that is another one when this package changes: then all pages are read again."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def _generate(app: Sphinx) -> None:
    pages = reference.pages(Path(app.srcdir))
    reference.write(Path(app.srcdir) / reference.FOLDER, pages)


def _finish(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        plain.write(app)
        inspection.report(Path(app.outdir))
