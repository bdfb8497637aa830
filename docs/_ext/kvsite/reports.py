"""Reports of studies: HTML pages of their own, which need no frame; they are copied as they are."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy(source: Path, built: Path) -> None:
    """Copy the pages of `results/`, and their tables as Markdown."""
    for page in sorted((source / "results").glob("*.html")):
        for path in (page, page.with_suffix(".md")):
            if path.is_file():
                shutil.copyfile(path, built / "results" / path.name)
