"""The reader of a vLLM's sources, on small trees that are written here."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from kvpolicy.errors import KVPolicyError
from kvpolicy.runtimes.vllm import hooks
from kvpolicy.runtimes.vllm.hooks import HOOKS, Hook, look, missing
from kvpolicy.runtimes.vllm.refusals import hooks_refusal
from kvpolicy.runtimes.vllm.sources import Sources

SCRIPT = Path(__file__).parents[2] / "scripts" / "vllm_hooks.py"
MANAGER = "v1.core.single_type_kv_cache_manager"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kvpolicy_vllm_hooks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, modules):
    for module, text in {"": "", "_version": "__version__ = version = '9.1'\n", **modules}.items():
        file = folder / "vllm" / (f"{module.replace('.', '/')}.py" if module else "__init__.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def whole(without=None):
    """The text of modules that have every hook but one, and nothing else."""
    texts = {}
    for module in {each.module for each in HOOKS}:
        loose, classes = [], defaultdict(lambda: ["..."])
        for each in HOOKS:
            if each.module != module or each == without:
                continue
            owner, _, name = each.name.rpartition(".")
            stub = f"{name} = 0" if each.arguments is None else f"def {name}({each.arguments}): ..."
            (classes[owner] if owner else loose).append(stub)
        for owner, stubs in classes.items():
            loose += [f"class {owner}:", *(f"    {stub}" for stub in stubs)]
        texts[module] = "\n".join(loose) + "\n"
    return texts


def with_manager(folder, body, extra=None):
    """A tree whose manager class is this."""
    return write(folder, {MANAGER: body} | (extra or {}))


def found(folder, name):
    return look(next(each for each in HOOKS if each.name == name), Sources(folder))


def test_a_tree_with_all_hooks_lacks_none(tmp_path):
    assert missing(write(tmp_path, whole())) == {}
    assert missing(tmp_path / "vllm") == {}


def test_a_wheel_is_read_like_the_folder_it_holds(tmp_path):
    texts = whole()
    texts["v1.core.block_pool"] = "class BlockPool: ...\n"
    write(tmp_path / "tree", texts)
    wheel = tmp_path / "vllm-9.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as into:
        for file in (tmp_path / "tree").rglob("*.py"):
            into.write(file, file.relative_to(tmp_path / "tree"))
    lacking = missing(tmp_path / "tree")
    assert set(lacking) == {
        "vllm.v1.core.block_pool.BlockPool." + name for name in ("get_num_free_blocks", "num_gpu_blocks")
    }
    assert missing(wheel) == lacking
    assert Sources(wheel).version == Sources(tmp_path / "tree").version == "9.1"


def test_each_hook_alone_is_missed(tmp_path):
    write(tmp_path, whole())
    for each in HOOKS:
        write(tmp_path, {each.module: whole(without=each)[each.module]})
        found = look(each, Sources(tmp_path))
        assert not found.holds
        assert found.says == "missing" or found.says.startswith("moved to"), each  # two modules have an InputBatch
        write(tmp_path, {each.module: whole()[each.module]})


def test_a_function_that_moved_is_found_in_its_new_home_with_what_changed(tmp_path):
    write(tmp_path, {
        "v1.core.kv_cache_utils": "X = 1\n",
        "v1.core.kv_cache_planning":
            "def get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory, groups): ...\n",
        "other": "get_kv_cache_configs = None  # def get_kv_cache_configs(\n",
    })  # fmt: skip
    assert found(tmp_path, "get_kv_cache_configs") == (
        False, "moved to v1.core.kv_cache_planning and gained groups",
    )  # fmt: skip


def test_a_class_that_moved_has_its_methods_there(tmp_path):
    write(
        tmp_path,
        {"v1.core.managers": "class FullAttentionManager(Any):\n    def pop_blocks_for_free(self, request_id): ...\n"},
    )
    assert found(tmp_path, "FullAttentionManager.pop_blocks_for_free") == (False, "moved to v1.core.managers")
    assert found(tmp_path, "FullAttentionManager.allocate_new_blocks") == (False, "missing")


@pytest.mark.parametrize(
    "manager",
    [
        "from vllm.v1.core.base import Base\nclass FullAttentionManager(Base): ...\n",
        "from .base import Base as Other\nclass FullAttentionManager(Other[int]): ...\n",
        "from ..core.base import Base as FullAttentionManager\n",
        "if LINUX:\n    X = 1\nelse:\n    from vllm.v1.core.base import Base\nclass FullAttentionManager(Base): ...\n",
        "try:\n    X = 1\nfinally:\n    ...\nfrom .again import Base as B\nclass FullAttentionManager(B): ...\n",
    ],
    ids=["base", "relative and generic", "imported under the name", "under else", "imported twice"],
)
def test_what_is_inherited_or_imported_counts_as_there(manager, tmp_path):
    base = "class Base:\n    def pop_blocks_for_free(self, request_id): ...\n"
    with_manager(tmp_path, manager, {"v1.core.base": base, "v1.core.again": "from vllm.v1.core.base import Base\n"})
    assert found(tmp_path, "FullAttentionManager.pop_blocks_for_free") == (True, "as expected")


def test_what_is_set_on_self_counts_as_an_attribute(tmp_path):
    body = "class BlockPool:\n    def __init__(self):\n        self.num_gpu_blocks: int = 0\n"
    write(tmp_path, {"v1.core.block_pool": body})
    assert found(tmp_path, "BlockPool.num_gpu_blocks").holds
    write(tmp_path, {"v1.core.block_pool": body.replace("self.num", "num")})
    assert not found(tmp_path, "BlockPool.num_gpu_blocks").holds


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("self, request_id, processed_computed_tokens, num_prompt_tokens=None", (True, "as expected")),
        ("self, request_id, processed_computed_tokens", (True, "lost num_prompt_tokens")),
        ("self, *args, **kwargs", (True, "as expected")),
        ("self, request_id, processed_computed_tokens, num_prompt_tokens, more=0", (False, "gained more")),
        ("self, request_id, num_prompt_tokens", (False, "lost processed_computed_tokens")),
        (
            "self, processed_computed_tokens, request_id, num_prompt_tokens",
            (False, "changed the order of its arguments"),
        ),
    ],
)
def test_a_changed_signature_of_what_is_overridden(arguments, expected, tmp_path):
    with_manager(tmp_path, f"class FullAttentionManager:\n    def remove_skipped_blocks({arguments}): ...\n")
    assert found(tmp_path, "FullAttentionManager.remove_skipped_blocks") == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("self, request_id, num_tokens, num_tokens_main_model", (True, "as expected")),
        ("self, request_id, num_tokens, num_tokens_main_model, *, more", (True, "as expected")),
        ("self, request_id, num_tokens", (True, "as expected")),
        ("self, request_id, n, num_tokens, num_tokens_main_model", (False, "gained n, num_tokens_main_model")),
        ("self, request_id", (False, "lost num_tokens")),
    ],
)
def test_what_is_overridden_and_passed_on_may_gain_arguments_at_the_end(arguments, expected, tmp_path):
    with_manager(tmp_path, f"class FullAttentionManager:\n    def allocate_new_blocks({arguments}): ...\n")
    assert found(tmp_path, "FullAttentionManager.allocate_new_blocks") == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("backend, class_path=None, more=None", (True, "as expected")),
        ("backend, class_path=None, *, more", (False, "gained more")),
        ("backend, kind=None, class_path=None", (False, "gained kind")),
        ("backend", (False, "lost class_path")),
        ("backend, **options", (True, "as expected")),
    ],
)
def test_a_changed_signature_of_what_is_called(arguments, expected, tmp_path):
    write(tmp_path, {"v1.attention.backends.registry": f"def register_backend({arguments}): ...\n"})
    assert found(tmp_path, "register_backend") == expected


def test_a_function_that_became_something_else_does_not_hold(tmp_path):
    write(tmp_path, {"v1.attention.backends.registry": "register_backend = make()\n"})
    assert found(tmp_path, "register_backend") == (False, "is no function")


def test_a_folder_without_vllm_is_named(tmp_path, script, capsys):
    with pytest.raises(KVPolicyError, match=r"holds no vllm/__init__\.py"):
        missing(tmp_path)
    with pytest.raises(SystemExit):
        script.main([str(tmp_path)])
    assert f"{tmp_path} holds no vllm/__init__.py" in capsys.readouterr().err


def test_the_script_prints_what_differs_and_ends_with_1_if_a_hook_is_missing(tmp_path, script, capsys):
    good, bad = whole(), whole()
    good["v1.worker.worker_base"] = "class WorkerBase: ...\n"  # the plugin stands under it only
    bad[MANAGER] = bad[MANAGER].replace("def pop_blocks_for_free(self, request_id)", "def pop(self)")
    write(tmp_path / "good", good)
    write(tmp_path / "bad", bad)
    assert script.main([str(tmp_path / "good")]) == 0
    used = sum(each.use != "stands under" for each in HOOKS)
    assert capsys.readouterr().out.splitlines() == [
        f"vLLM 9.1: {used} of {used} hooks are there",
        "    stands under vllm.v1.worker.worker_base.WorkerBase.set_kv_cache_layout: missing",
    ]
    assert script.main([str(tmp_path / "good"), str(tmp_path / "bad")]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"vLLM 9.1: {used - 1} of {used} hooks are there",
        f"  ! overrides vllm.{MANAGER}.FullAttentionManager.pop_blocks_for_free: missing",
    ]


def test_the_page_has_a_row_for_every_hook(script):
    rows = [line for line in script.PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| `{h.module}` `{h.name}`", h.use] for h in HOOKS]
    assert all(row.count("|") == rows[0].count("|") for row in rows)


def test_a_page_says_what_was_found(script):
    looked = [(True, "as expected")] * len(HOOKS)
    looked[[each.name for each in HOOKS].index("register_backend")] = (False, "moved to elsewhere")
    page = script.page([("9.1", [script.HookFound(*each) for each in looked])])
    assert page.count("| ✓ |") == len(HOOKS) - 1
    assert "| moved to elsewhere |" in page
    assert "  - calls vllm.v1.attention.backends.registry.register_backend: moved to elsewhere" in page


def test_names_are_once_in_the_list():
    assert len(set(HOOKS)) == len({(each.module, each.name) for each in HOOKS}) == len(HOOKS)
    assert all(re.fullmatch(r"\w+(\.\w+)*", each.module) for each in HOOKS)
    assert Hook("plugins", "reads", "DEFAULT_PLUGINS_GROUP", None) in HOOKS


def plugin():
    """The syntax trees of the plugin."""
    folder = Path(hooks.__file__).parent
    return [ast.parse(file.read_text()) for file in folder.glob("*.py")]


def test_all_that_the_plugin_imports_from_vllm_is_in_the_list():
    known = {(f"vllm.{each.module}", each.name.partition(".")[0]) for each in HOOKS}
    modules = {f"vllm.{each.module}" for each in HOOKS}
    for tree in plugin():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for each in node.names:
                    assert (node.module, each.name) in known or f"{node.module}.{each.name}" in modules, each.name


def test_all_that_the_plugin_overrides_is_in_the_list_with_its_own_arguments():
    theirs = re.compile(r"base|Base|FullAttention\w+")
    own = set()
    for tree in plugin():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(theirs.fullmatch(ast.unparse(base)) for base in node.bases):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or method.name[0] != "_"):
                        for argument in [*method.args.args, method.args.vararg, method.args.kwarg]:
                            if argument:
                                argument.annotation = None
                        own.add((method.name, ast.unparse(method.args)))
    listed = {(each.name.partition(".")[2], each.arguments) for each in HOOKS if each.use == "overrides"}
    assert own - {("of", "spec, plan")} == listed - {("prepare_attn", "self, input_batch")}


def test_an_engine_of_an_untried_version_starts_only_if_it_has_every_hook(tmp_path):
    texts = whole()
    assert hooks_refusal("9.1", write(tmp_path / "good", texts) / "vllm") is None
    texts["v1.core.block_pool"] = "class BlockPool: ...\n"
    assert hooks_refusal("9.2", write(tmp_path / "bad", texts) / "vllm") == (
        "vLLM 9.2 does not have what kvpolicy uses: vllm.v1.core.block_pool.BlockPool.get_num_free_blocks (missing) "
        "and 1 more; install one of the versions that kvpolicy was tested with."
    )
    hooks_refusal.cache_clear()


def test_reading_loads_neither_vllm_nor_torch(tmp_path):
    write(tmp_path, whole())
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', {str(tmp_path)!r}]\n"
        "try:\n    runpy.run_path({!r}, run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {{'vllm', 'torch'}} & set(sys.modules)\n"
    ).format(str(SCRIPT))
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
