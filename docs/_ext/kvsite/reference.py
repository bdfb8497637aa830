"""The folder `reference/`: pages that are generated from the code before each build, and committed nowhere."""

from __future__ import annotations

from pathlib import Path

from kvsite import commands, components, files, interface, policies

FOLDER = "reference"


def pages(root: Path) -> dict[str, str]:
    """Return path, relative to the folder of the pages, and text of everything that is generated."""
    return {**policies.pages(root), **components.pages(), **commands.pages(), **interface.pages(), **files.pages(root)}


def write(folder: Path, made: dict[str, str]) -> None:
    """Write what has changed, so that only that is built again, and remove what is no more."""
    wanted = {folder.parent / name: text for name, text in made.items()}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
