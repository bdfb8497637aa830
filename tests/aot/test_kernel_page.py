"""docs/write-a-kernel.md, followed to the letter in a fresh environment: every file written, every command run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from kvpolicy_kernels import aot
from kvsupport.stranger import Stranger, succeeded

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the page says itself when it interprets"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "write-a-kernel.md"
BLOCKS = re.findall(r"^```(\S*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Return the package that comes out, and what each command printed."""
    stranger = Stranger(tmp_path_factory.mktemp("page"))
    here, printed = stranger.folder, {}
    for kind, text in BLOCKS:
        if kind == "bash":
            for line in text.splitlines():
                out = succeeded(stranger.shell(f"{line} && pwd", here))
                *shown, folder = out.splitlines()
                here = Path(folder)
                printed[line] = "\n".join(shown)
        else:
            name = re.match(r"# ([\w./-]+)\n", text)[1]
            (here / name).write_text(text, encoding="utf-8")
    return here, printed


def test_every_block_is_a_named_file_or_a_command():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "yaml"}
    files = [re.match(r"# (.+)\n", text)[1] for kind, text in BLOCKS if kind != "bash"]
    assert len(files) == len(set(files))
    assert all(file.split("/")[0] in ("example_plugin", "tests") for file in files)


def test_its_tests_run_and_pass(followed):
    _, printed = followed
    results = {line: out for line, out in printed.items() if "pytest" in line}
    assert len(results) == 4
    for line, out in results.items():
        assert re.search(r"\b[1-9]\d* passed", out), line
        assert not re.search(r"\b(failed|error)", out), out
        # Some laws are about what a scorer does not do; a test of the kernel must not be left out.
        assert "skipped" not in out or "laws" in line, out


def test_its_kernel_was_compiled_for_every_target_without_spills(followed):
    folder, printed = followed
    table = json.loads((folder / "tests" / "resources.json").read_text())
    assert len(table) == 12
    assert all(set(row) == set(aot.TARGETS) for row in table.values())
    assert not any(of["spills"] for row in table.values() for of in row.values())
    (out,) = [out for line, out in printed.items() if "kvpolicy_kernels.aot" in line]
    assert out.endswith("0 with problems")
