"""Every block and command of the documentation runs, or says why not; the list of those that do not is below."""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Mapping
from types import ModuleType

import pytest

import kvpolicy
from kvpolicy import ops
from kvpolicy.study.spec import StudySpec
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.pages import REASONS, ROOT, PageReader, blocks, check_names, pages

NOT_RUN = {
    "README.md": ["installs", "vLLM"],
    "docs/benchmarks.md": ["minutes"] * 8,
    "docs/bridges.md": ["kvpress", "hub", "hub"],
    "docs/development.md": ["installs", "minutes", "minutes"],
    "docs/from-kvpress.md": ["kvpress", "kvpress"],
    "docs/from-rkv.md": ["R-KV", "hub"],
    "docs/gpu.md": ["GPU", "installs"],
    "docs/kvpress.md": ["kvpress"],
    "docs/quick-start.md": ["installs", "installs"],
    "docs/results/README.md": ["minutes"] * 5,
    "docs/serving.md": ["vLLM", "vLLM", "vLLM", "installs", "vLLM"],
    "docs/studies.md": ["minutes"],
    "docs/tables.md": ["hub", "minutes"],
}
"""Page -> why each of its blocks that do not run does not, in order."""

PAGES = {str(page.relative_to(ROOT)): blocks(page) for page in pages()}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from kvpolicy.testing.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("pages") / "model")


@pytest.fixture(scope="session")
def known(model_folder):
    """What pages take as known: a model, its tokenizer, the tokens of a prompt, and the names of a plugin's author."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    names = {name: getattr(kvpolicy, name) for name in kvpolicy.__all__ if not name.startswith("__")}
    return {
        **names,
        "ClassVar": typing.ClassVar,
        "Mapping": Mapping,
        "AllocationRequest": kvpolicy.contracts.components.AllocationRequest,
        "inputs": dict(tokenizer(["a prompt of a few words"], return_tensors="pt")),
        "model": model,
        "ops": ops,
        "tokenizer": tokenizer,
        "torch": torch,
    }


@pytest.fixture
def own_package(monkeypatch):
    """The reader's own package, as pages about plugins name it."""

    class Mine(kvpolicy.ImportanceScorer):
        """Newer matters more."""

        def score(self, view):
            return view.positions.float().masked_fill(~view.valid, 0.0)

    for name in ("my_plugin", "my_plugin.scorer", "my_package"):
        module = ModuleType(name)
        module.Mine = module.MyScorer = Mine
        monkeypatch.setitem(sys.modules, name, module)
    kvpolicy.catalog().register("my_plugin_mine", Mine)
    yield
    kvpolicy.catalog().unregister("importance", "my_plugin_mine")


@pytest.mark.parametrize("page", [name for name, found in PAGES.items() if any(b.mark is None for b in found)])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, model_folder, known, own_package, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVPOLICY_POLICY_PATH", str(tmp_path))  # as if the reader's policies were registered
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("prose.txt", "code.md", "problems.jsonl"):
        (tmp_path / name).write_text("One word after the other makes a text. " * 60, encoding="utf-8")
    (tmp_path / "my_plugin").mkdir()
    (tmp_path / "my_plugin" / "policies").symlink_to(tmp_path)
    reader = PageReader(tmp_path, model_folder, {**known, "__name__": "page"})
    for block in PAGES[page]:
        if block.mark is None:
            reader.run(block)


def test_what_does_not_run_is_listed_here_with_its_reason():
    found = {page: [b.value for b in each if b.mark == "not run"] for page, each in PAGES.items()}
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN
    assert {reason for reasons in NOT_RUN.values() for reason in reasons} <= set(REASONS)


def test_what_another_test_runs_is_run_there():
    tests = {block.value for each in PAGES.values() for block in each if block.mark == "run by"}
    assert tests
    for name in tests:
        text = (ROOT / name).read_text(encoding="utf-8")
        said = {page for page, each in PAGES.items() for block in each if (block.mark, block.value) == ("run by", name)}
        for page in said:
            assert page.rpartition("/")[2] in text, f"{name} does not speak of {page}"


def test_what_does_not_run_names_scripts_and_options_that_exist():
    for each in PAGES.values():
        for block in each:
            if block.mark == "not run":
                check_names(block)


def test_marks_are_seen_and_wrong_ones_are_not_blocks(tmp_path):
    page = ROOT / "docs" / "serving.md"
    marked = [block for block in blocks(page) if block.mark == "not run"]
    assert [block.value for block in marked] == NOT_RUN["docs/serving.md"]
    marks = re.findall(r"<!-- (?:not run|run by):", page.read_text(encoding="utf-8"))
    assert len(marks) == len(marked)


def test_a_page_that_is_wrong_is_noticed(tmp_path, model_folder, monkeypatch, capsys):
    from kvsupport.pages import Block

    monkeypatch.chdir(tmp_path)
    reader = PageReader(tmp_path, model_folder, {})
    wrong = [
        ("python", "assert 1 == 2\n"),
        ("python", "import kvpolicy\nkvpolicy.load('rkv', budged=3)\n"),
        ("yaml", "schema_version: 1\npolicy: a\nextends: rkv\nbudget: {tokens: 3}\n"),
        ("yaml", "# error: nothing\nschema_version: 1\npolicy: a\nextends: rkv\n"),
        ("", "kvpolicy show no-such-policy\n"),
        ("", "kvpolicy explain rkv --no-such-option\n"),
        ("", "make no-such-target\n"),
        ("sh", "pip install kvpolicy\n"),
        ("toml", "a = \n"),
        ("ruby", "1\n"),
    ]
    for language, text in wrong:
        block = Block("docs/none.md", 1, language, text)
        with pytest.raises((AssertionError, ValueError, kvpolicy.KVPolicyError, pytest.fail.Exception)):
            reader.run(block)


def test_every_policy_s_page_loads_as_it_says():
    pytest.importorskip("sphinx")
    from kvsite.policies import use

    for entry in kvpolicy.catalog().policies():
        spec = kvpolicy.load(entry.name)
        with stand_in_tables():
            policy = spec.build()
            text = use(spec, policy, served=True)
            (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            scope = {"kvpolicy": kvpolicy}
            exec(source, scope)
            assert scope["spec"].policy == entry.name


def test_studies_of_the_pages_are_studies():
    found = [b.text for each in PAGES.values() for b in each if "kind: study" in b.text and "# error" not in b.text]
    assert len(found) >= 3
    assert all(isinstance(StudySpec.from_yaml(text), StudySpec) for text in found if "models: [smollm2]" not in text)
