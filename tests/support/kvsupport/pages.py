"""The pages of the documentation, and their blocks run as a reader would run them.

A comment before a block says what becomes of it otherwise:

- ``<!-- not run: REASON -->``, a word of `REASONS`; the scripts in it and their options must exist.
- ``<!-- run by: tests/FILE.py -->``, that test runs it; ``<!-- blocks run by: ... -->`` is for a whole page.

Everything else runs: Python in one namespace per page, policies and studies are read and errors compared, commands of
`kvpolicy` are called with a tiny model in place of a real one.
"""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kvpolicy
from kvpolicy.cli import main

ROOT = Path(__file__).resolve().parents[3]
REASONS = {
    "installs": "it installs, clones or makes an environment",
    "minutes": "it measures for minutes or longer",
    "GPU": "it needs a GPU",
    "vLLM": "it needs vLLM, which is tested in an environment of its own",
    "hub": "it loads from the Hugging Face hub",
    "kvpress": "it is kvpress's, which cannot be installed beside",
    "R-KV": "it is a command of the R-KV repository",
}
_CHECKED = {"--all": "rkv", "my-package": "importance.recency"}
"""What is checked in place of everything, and of the reader's own package: tests/kit checks one that is installed."""
_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (not run|run by): (\S+) -->\n$")
_WHOLE = re.compile(r"^<!-- blocks run by: (\S+) -->$", re.MULTILINE)
_OPTIONS = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_SCRIPTS = re.compile(r"(?<![\w/.-])(?:benchmarks|scripts|tests)/[\w/]+\.(?:py|sh)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of its page, relative to the repository.
        line: of its first line.
        language: as the page says it; commands have none, or ``sh`` or ``bash``.
        text: what stands in it.
        mark: ``not run`` or ``run by``, or None.
        value: what the mark says.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str | None = None
    value: str = ""

    @property
    def is_command(self) -> bool:
        """Whether it is typed into a shell."""
        return self.language in ("", "sh", "bash")

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def pages() -> list[Path]:
    """Return all pages that people write or read as text."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "README.md"]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    whole = _WHOLE.search(text)
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        mark = _MARK.search(before.rstrip(" ").removesuffix("\n") + "\n")
        how = (mark[1], mark[2]) if mark else ("run by", whole[1]) if whole else (None, "")
        line = before.count("\n") + 2
        found.append(
            Block(str(page.relative_to(ROOT)), line, match[2], textwrap.dedent(match[3]), how[0], how[1]),
        )
    return found


def check_names(block: Block) -> None:
    """Check that the scripts that a block names exist, and know the options that it gives them."""
    for name in set(_SCRIPTS.findall(block.text)):
        assert (ROOT / name).is_file(), f"{block.page}:{block.line}: there is no {name}"
    for words in block.commands() if block.is_command else ():
        script = next((word for word in words if word.startswith(("benchmarks/", "scripts/"))), None)
        if script is None:
            continue
        folder = (ROOT / script).parent
        known = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
        known += (ROOT / script).read_text(encoding="utf-8")
        for option in _OPTIONS.findall(" ".join(words[words.index(script) :])):
            assert option in known, f"{block.page}:{block.line}: {script} does not know {option}"


class PageReader:
    """Runs the blocks of one page, in a folder of its own."""

    def __init__(self, folder: Path, model: Path, scope: dict[str, Any]) -> None:
        """Start in a folder, with a model in place of those that pages name, and the names that they take as known."""
        self.folder = folder
        self.model = str(model)
        self.scope = scope
        self.ran: list[str] = []

    def run(self, block: Block) -> None:
        """Run a block; raises what it raises."""
        where = f"{block.page}:{block.line}"
        if block.is_command:
            for words in block.commands():
                self._command(words, where)
        elif block.language == "python":
            source = "\n" * (block.line - 1) + block.text.replace(_HUB, self.model)
            exec(compile(source, str(ROOT / block.page), "exec"), self.scope)
        elif block.language == "yaml":
            self._file(block.text, where)
        elif block.language == "toml":
            assert tomllib.loads(block.text), where
        else:
            assert block.language == "text", f"{where}: no test knows what to do with {block.language}"

    def _file(self, text: str, where: str) -> None:
        """Read a policy or a study from the file that its first line names; a fragment stands in another policy."""
        named = re.match(r"# file: (\S+)\n", text)
        if "schema_version" not in text:
            text = f"schema_version: 1\npolicy: fragment\nextends: rkv\n{text}"
        name = re.search(r"^(?:policy|study): (\S+)$", text, flags=re.MULTILINE)
        assert name is not None, where
        path = self.folder / (named[1] if named else f"{name[1]}.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(self._small(text), encoding="utf-8")
        shown = path.relative_to(self.folder)
        expected = re.search(r"^# error: (.*)\n", text, flags=re.MULTILINE)
        if expected is None:
            self._read(shown, text)
            return
        with pytest.raises(kvpolicy.SpecError) as caught:
            self._read(shown, text)
        assert str(caught.value) == expected[1], where

    def _read(self, path: Path, text: str) -> None:
        from kvpolicy.study.spec import find_study

        read = find_study if "kind: study" in text else kvpolicy.load
        read(path)

    def _small(self, text: str) -> str:
        """Have a study run on the tiny model, with one problem in its quick version; errors are left as they are."""
        if "kind: study" not in text or "# error:" in text:
            return text
        for long, short in (
            ("[smollm2]", f"[{self.model}]"),
            ("words: 300", "words: 30"),
            ("tokens: 1024", "tokens: 192"),
            ("[0.03, 0.1, 0.3, 1.0]", "[0.1, 0.3]"),
            ("{budget: [{trace: 0.2}]}}", "{budget: [{trace: 0.3}, {trace: 0.2}]}}"),  # of which a smallest is asked
        ):
            text = text.replace(long, short)
        return re.sub(r"^(quick: \{samples: )\d+", r"\g<1>1", text, flags=re.MULTILINE)

    def _command(self, words: Sequence[str], where: str) -> None:
        if words[0] == "make":
            continuous = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
            for target in words[1:]:
                assert f"make {target}\n" in continuous, (
                    f"{where}: CI does not run make {target}; say that it is not run"
                )
            return
        assert words[0] == "kvpolicy", f"{where}: no test runs {words[0]}; say why it is not run"
        arguments = self._shorter([*words[1:]])
        code = main(arguments)
        assert code == 0, f"{where}: kvpolicy {shlex.join(arguments)} ends with {code}"
        self.ran.append(words[1])

    def _shorter(self, words: list[str]) -> list[str]:
        """Return the same command over a tiny model and few tokens, or one law."""
        for option, most in (("--max-new-tokens", 300 if words[0] == "trace" else 40), ("--runs", 1)):
            if option in words:
                place = words.index(option) + 1
                words[place] = str(min(int(words[place]), most))
        if "--model" in words:
            words[words.index("--model") + 1] = self.model
        elif words[0] in ("generate", "trace"):
            words += ["--model", self.model]
        if words[0] == "check":
            words = [*(_CHECKED.get(word, word) for word in words), "--law", "deterministic", "--jobs", "1"]
        if words[0] == "study":
            words = self._quick(words)
        return [path for word in words for path in (self._matching(word) if "*" in word else [word])]

    def _quick(self, words: list[str]) -> list[str]:
        """Return a command about the quick version of a study, or about the file of its results."""
        if words[2].endswith((".sqlite", ".json.gz")):
            name = words[2].replace(".", "-quick.", 1)
            words[2] = name if (self.folder / name).is_file() else words[2]
        else:
            words = [*(word for word in words if word != "--quick"), "--quick"]
        few = ["--loss", "0.9", "--confidence", "0.5"]  # one problem shows no less
        return [*words, *{"run": ["--workers", "1"], "budget": few, "prune": ["--yes"]}.get(words[1], [])]

    def _matching(self, pattern: str) -> list[str]:
        found = sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))
        assert found, f"nothing matches {pattern}"
        return found
