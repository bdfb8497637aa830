"""Pages that show the files outside this folder to which pages link: the site can be read without the repository."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Container
from pathlib import Path

LONGEST = 60_000  # characters; of a longer file its beginning is shown
_IGNORED = re.compile(r"(__pycache__|\.egg-info|\.pytest_cache|\.hypothesis|\.ruff_cache|/build)(/|$)")
_RELATIVE = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {
    ".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json", ".jsonl": "text",
    ".css": "css", ".js": "javascript", ".html": "html", ".txt": "text", ".cff": "yaml",
}  # fmt: skip


def page_of(path: str) -> str:
    """Return the name of the page that shows a file or folder of the repository."""
    return "reference/files/" + re.sub(r"[^\w./-]", "_", path).replace(".", "-").strip("/")


def linked(root: Path) -> list[str]:
    """Return the paths outside this folder, relative to the repository, that pages of this folder link to."""
    from kvsite.sources import LINK, split_fences

    found = set()
    for page in sorted(root.rglob("*.md")):
        inside = page.relative_to(root)
        if inside.parts[0] in ("reference", "_ext"):
            continue
        for fenced, part in split_fences(page.read_text(encoding="utf-8")):
            for match in () if fenced else LINK.finditer(part):
                target = posixpath.normpath(posixpath.join("docs", inside.parent.as_posix(), match["path"]))
                if not target.startswith("docs/"):
                    found.add(target)
    return sorted(found)


def pages(root: Path) -> dict[str, str]:
    """Return name and text of a page for each linked file, and of a list of them."""
    repository = root.parent
    made = {}
    shown = linked(root)
    for path in shown:
        if not (repository / path).exists():
            raise FileNotFoundError(f"a page of {root.name}/ links to {path}, which is not there")
        made[f"{page_of(path)}.md"] = _page(repository, path, shown)
    names = [posixpath.relpath(page, "reference/files") for page in made]
    listed = "\n".join(f"- [`{path}`]({name})" for path, name in zip(linked(root), names, strict=True))
    tree = "\n".join(["```{toctree}", ":hidden:", "", *(name.removesuffix(".md") for name in names), "```"])
    head = "# Files of the repository\n\nThe files that these pages refer to, as they were when the site was built.\n"
    return {"reference/files/index.md": f"{head}\n{listed}\n\n{tree}\n", **made}


def _page(repository: Path, path: str, shown: Container[str]) -> str:
    place = repository / path
    if place.is_dir():
        names = [each for each in sorted(place.rglob("*")) if each.is_file() and not _IGNORED.search(str(each))]
        parts = [f"## `{each.relative_to(place)}`\n\n{_shown(each)}" for each in names]
        return f"# `{path}/`\n\n" + "\n\n".join(parts) + "\n"
    if place.suffix == ".md":
        text = place.read_text(encoding="utf-8")
        return _RELATIVE.sub(lambda found: _inside(found, posixpath.dirname(path), repository, shown), text)
    if place.suffix == ".ipynb":
        return _notebook(path, place)
    return f"# `{path}`\n\n{_shown(place)}\n"


def _notebook(path: str, place: Path) -> str:
    """Return the cells of a notebook and what they gave: text as text, pictures as PNG."""
    parts = [f"`{path}`"]
    for cell in json.loads(place.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                png = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![what the cell drew](data:image/png;base64,{png})")
            elif output.get("name") != "stderr":
                parts.append(_fenced("".join(output.get("text") or data.get("text/plain", "")), "text"))
    # A page begins with its heading.
    heads = [index for index, part in enumerate(parts) if part.startswith("# ")]
    title = parts.pop(heads[0]).split("\n", 1) if heads else [f"# {path}"]
    return "\n\n".join([title[0], parts[0], *title[1:], *parts[1:]]) + "\n"


def _inside(found: re.Match[str], folder: str, repository: Path, shown: Container[str]) -> str:
    """Lead a link of a file to the page of the site that it means, and leave the words of any other."""
    target = posixpath.normpath(posixpath.join(folder, found["path"]))
    if target.startswith("docs/") and target.endswith(".md") and (repository / target).is_file():
        return f"[{found['text']}](/{target.removeprefix('docs/')}{found['anchor'] or ''})"
    if not found["anchor"] and target in shown:
        return f"[{found['text']}](/{page_of(target)}.md)"
    return found["text"]


def _shown(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if len(text) > LONGEST:
        text = text[:LONGEST] + "\n…\n"
    return _fenced(text, LANGUAGES.get(path.suffix, "text"))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
