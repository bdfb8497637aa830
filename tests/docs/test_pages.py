"""What several pages say in common: they promise no release, and their tables of extras and variables are whole."""

from __future__ import annotations

import re
import tomllib

import pytest

from kvsupport.pages import ROOT, pages

PACKAGES = ("kvpolicy", "plugins", "kernels", "registry")


@pytest.mark.parametrize("page", [*pages(), *sorted((ROOT / "examples").rglob("*.md"))], ids=lambda page: page.name)
def test_pages_install_from_the_clone_and_leave_the_rest_to_the_quick_start(page):
    text = page.read_text(encoding="utf-8").replace("pip install 'kvpolicy[NAME]'", "")  # said, and what it does
    assert not re.search(r"pip install[^\n#`]*[\"' ]kvpolicy|pypi\.org/project/kvpolicy", text)


def test_the_quick_start_has_every_extra():
    table = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8").partition("## Extras")[2]
    said = [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)[1:] for name in re.findall(r"`([\w-]+)`", row)
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(said) == sorted(project["optional-dependencies"])


def test_the_glossary_has_every_environment_variable():
    sources = [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
    read = {name for path in sources for name in re.findall(r"KVPOLICY_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))}
    table = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").partition("## Environment variables")[2]
    assert len(read) > 5
    assert read == set(re.findall(r"`(KVPOLICY_\w+)`", table.partition("\n## ")[0]))
