"""docs/context.md is true: its Python runs, and answers."""

from __future__ import annotations

import re
import warnings
from typing import Any

from kvpolicy.testing.tiny import tiny_folder
from kvsupport.contexts import CONTEXT
from kvsupport.pages import ROOT, PageReader, blocks

PAGE = ROOT / "docs" / "context.md"


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(CONTEXT)
    model = tiny_folder(tmp_path / "tiny", "qwen3")
    names: dict[str, Any] = {"path": str(model), "text": CONTEXT}
    reader = PageReader(tmp_path, model, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is said to be left as it was
        for block in blocks(PAGE):
            reader.run(block)
            if "resident" not in names and block.language == "python":
                names["resident"], peak, size = map(int, capsys.readouterr().out.split())
    assert reader.ran == ["generate"]
    assert "snapkv-prefill / full" in capsys.readouterr().out
    assert names["resident"] < peak == 278
    assert size > 0
    assert names["answer"] == names["first"]
    assert len(names["answers"]) == len(names["found"]) == 2
    assert names["one"] == names["found"][0] != names["second"]


def test_the_page_links_to_what_there_is():
    for target in re.findall(r"\]\(([^)#]+\.md)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).is_file(), target
