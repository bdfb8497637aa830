"""What the documentation site does otherwise than a forge; `make docs` builds it, and tests/browser looks at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvpolicy
from kvpolicy.contracts.components import KINDS

pytest.importorskip("sphinx")
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def adapted(tmp_path):
    """Return a function that writes a page into a repository and returns what Sphinx reads of it."""
    from kvsite import sources

    root = tmp_path / "docs"
    (root / "results").mkdir(parents=True)
    (root / "results" / "scope.md").write_text("# scope")

    def adapt(text, name="page"):
        (root / f"{name}.md").write_text(text)
        content = [text]
        app = SimpleNamespace(srcdir=str(root), config=SimpleNamespace(root_doc="index"))
        sources.adapt(app, name, content)
        return content[0]

    return adapt


def test_links_out_of_the_folder_lead_to_pages_that_show_the_file(adapted):
    assert adapted("[a](../LICENSE) and [b](other.md#x)") == "[a](/reference/files/LICENSE.md) and [b](other.md#x)"
    assert adapted("[a](../../scripts/x.py)", "results/scope") == "[a](/reference/files/scripts/x-py.md)"
    assert adapted("[a](/spec.md#x)") == "[a](/spec.md#x)"
    assert adapted("[a](https://example.org/../x)") == "[a](https://example.org/../x)"


def test_published_studies_are_listed_on_the_page_of_results(adapted):
    assert adapted("# Results\n", "results/README").endswith("```{toctree}\n:maxdepth: 1\n\nscope\n```\n")


def test_blocks_are_left_alone_and_comments_go(adapted):
    text = "```\n[a](../LICENSE) <!-- kept -->\n```\n<!-- not run:\ninstalls -->\nafter\n"
    assert adapted(text) == "```\n[a](../LICENSE) <!-- kept -->\n```\n\n\nafter\n"


def test_a_picture_becomes_one_for_each_scheme(adapted):
    text = '<picture>\n<source media="x" srcset="dark.svg">\n<img alt="words" src="light.svg" width="3">\n</picture>\n'
    found = adapted(text)
    assert "```{image} light.svg\n:class: only-light\n:alt: words\n```" in found
    assert "```{image} dark.svg\n:class: only-dark\n:alt: words\n```" in found
    assert "<picture>" not in found


def test_links_of_files_lead_to_pages_of_the_site_or_are_words(tmp_path):
    from kvsite.files import pages

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("[changes](../CHANGES.md) [a](../examples/a.py)\n")
    (tmp_path / "CHANGES.md").write_text("[p](docs/page.md#x) [here](#y) [a](examples/a.py) [w](https://example.org)\n")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.py").write_text("print('````')\n")
    made = pages(tmp_path / "docs")
    assert made["reference/files/CHANGES-md.md"] == (
        "[p](/page.md#x) here [a](/reference/files/examples/a-py.md) [w](https://example.org)\n"
    )
    assert made["reference/files/examples/a-py.md"] == "# `examples/a.py`\n\n`````python\nprint('````')\n`````\n"
    output = {"output_type": "display_data", "data": {"image/png": "aGk=\n", "text/plain": ["<Figure>"]}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["2\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Two\n", "\n", "and two"]},
        {"cell_type": "code", "source": ["print(2)"], "outputs": [printed, output]},
    ]
    (tmp_path / "examples" / "n.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "docs" / "page.md").write_text("[n](../examples/n.ipynb)\n")
    assert pages(tmp_path / "docs")["reference/files/examples/n-ipynb.md"] == (
        "# Two\n\n`examples/n.ipynb`\n\n\nand two\n\n```python\nprint(2)\n```\n\n```text\n2\n```\n\n"
        "![what the cell drew](data:image/png;base64,aGk=)\n"
    )
    (tmp_path / "docs" / "page.md").write_text("[gone](../nowhere.py)\n")
    with pytest.raises(FileNotFoundError, match=r"links to nowhere\.py"):
        pages(tmp_path / "docs")


def test_every_page_has_its_place():
    from kvsite.navigation import SECTIONS

    listed = [page for pages in SECTIONS.values() for page in pages]
    written = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.glob("*.md")} - {"index"}
    assert len(listed) == len(set(listed))
    assert written <= set(listed)


def test_everything_that_is_bundled_has_a_page_or_a_section(monkeypatch, tmp_path):
    from kvsite import components, policies

    monkeypatch.setattr(policies, "_kernels", lambda name: f"kernels of {name}")  # each is a run of a tiny model
    monkeypatch.setattr(policies, "_fingerprint", lambda: "now")
    made = {**policies.pages(tmp_path / "docs"), **components.pages()}
    for entry in kvpolicy.catalog().policies():
        page = made[f"reference/policies/{entry.name}.md"]
        assert f"kernels of {entry.name}" in page
        for part in ("**runs**", "**models**", "**vLLM**", "## Parameters", "## The file"):
            assert part in page
    for kind in KINDS:
        for entry in kvpolicy.catalog().entries(kind):
            assert f"\n## {entry.name}\n" in made[f"reference/components/{kind}.md"]
    assert "`observe` | `8` | `integer >= 1`" in made["reference/components/importance.md"]
    assert "refused: cannot be served in vLLM (trait equal_counts)" in made["reference/policies/adakv-snapkv.md"]


def test_the_interface_that_is_documented_is_there():
    from kvsite.interface import pages, parts

    made = pages()
    assert {name for name in kvpolicy.__all__ if not name.startswith("__")} == {
        member.rpartition(".")[2] for member in parts()[0].members
    }
    assert ".. autoclass:: kvpolicy.PolicySpec" in made["reference/api/kvpolicy.rst"]


def test_every_command_is_described():
    from kvsite.commands import pages

    page = pages()["reference/commands.md"]
    for name in ("list", "show", "explain", "check", "generate", "trace", "study run", "study report", "new plugin"):
        assert f"\n## kvpolicy {name}\n" in page
    assert "`--budget N`" in page


def test_links_of_a_built_site_are_followed(tmp_path):
    from kvsite.inspection import faults

    (tmp_path / "a.html").write_text(
        '<h1 id="here">A</h1><a href="#here">x</a><a href="b.html#there">x</a><a href="https://example.org">x</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1><img src="b.svg"><a href="folder/">x</a>')
    (tmp_path / "b.svg").write_text("<svg/>")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("")
    assert faults(tmp_path) == []
    (tmp_path / "c.html").write_text(
        '<a href="b.html#nowhere">x</a><a href="none.html">x</a><script src="https://cdn.example.org/x.js"></script>'
    )
    assert faults(tmp_path) == [
        "c.html: asks for https://cdn.example.org/x.js",
        "c.html: the link b.html#nowhere leads to no place of its page",
        "c.html: the link none.html leads nowhere",
    ]


def test_what_is_generated_no_more_is_removed_and_what_is_the_same_left_alone(tmp_path):
    from kvsite.reference import FOLDER, write

    folder = tmp_path / FOLDER
    write(folder, {"reference/a.md": "one", "reference/deep/b.md": "two"})
    before = (folder / "a.md").stat().st_mtime_ns
    write(folder, {"reference/a.md": "one"})
    assert (folder / "a.md").stat().st_mtime_ns == before
    assert not (folder / "deep" / "b.md").exists()


def test_the_configuration_is_read_without_a_network_or_a_model():
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        f"sys.path.insert(0, {str(DOCS)!r})\n"
        "import conf, kvsite\n"
        "assert conf.html_theme == 'furo'\n"
        "print('transformers' in sys.modules)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_every_part_of_a_policy_in_words_has_a_name():
    from kvsite import policies

    spec = kvpolicy.load("rkv")
    rows = policies._in_words(spec, spec.build())
    assert all(label for label, _ in rows)
    (when,) = [said for label, said in rows if label == "when"]
    assert "Between two compactions" in when
