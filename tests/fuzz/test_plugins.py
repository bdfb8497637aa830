"""Bad plugin packages: each is named in one sentence and left out, and the rest keeps working."""

from __future__ import annotations

import importlib
import sys
import textwrap
import threading
import uuid
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import KVPolicyError, PluginError
from kvpolicy.loading import installed

HEAD = """
from kvpolicy import ImportanceScorer, hookimpl

class Mine(ImportanceScorer):
    def score(self, view):
        return view.positions.float()
"""
COMPONENTS = HEAD + "\n@hookimpl\ndef kvpolicy_register_components(register):\n"
POLICIES = HEAD + "\n@hookimpl\ndef kvpolicy_register_policies(register):\n"


def body(text):
    return textwrap.indent(textwrap.dedent(text).strip(), "    ") + "\n"


# What is wrong -> (source, what the sentence says, what the entry point names in the module).
BAD = {
    "import error": ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that", ""),
    "exit at import": ("raise SystemExit", "failed to load: SystemExit.", ""),
    "panic at import": ("class Panic(BaseException): pass\nraise Panic('rust')", "Panic: rust.", ""),
    "recursion at import": ("def f(): f()\nf()", "RecursionError", ""),
    "null byte": ("x = '\0'", "null bytes", ""),
    "exception that cannot be written": (
        "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E", "failed to load: E.", "",
    ),
    "exception that exits when it is written": (
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "failed to load: E.", "",
    ),
    "our exception that cannot be written": (
        (
            "from kvpolicy import PluginError\nclass E(PluginError):\n    def __str__(self): raise RuntimeError\n"
            "raise E"
        ),
        "failed to load: E.", "",
    ),
    "our exception with many lines": (
        "from kvpolicy import PluginError\nraise PluginError('first\\n' + 'second' * 1000)", "PluginError: first.", "",
    ),
    "huge message": ("raise RuntimeError('x' * 10**6)", "RuntimeError: xxx", ""),
    "many lines": ("raise RuntimeError('\\n\\n first\\rsecond\\u2028third')", "RuntimeError", ""),
    "missing attribute": ("", "has no attribute 'plugin'", ":plugin"),
    "an unhashable plugin": ("plugin = {}", None, ":plugin"),  # brings nothing, as the next
    "a number": ("plugin = 3\nkvpolicy_api = 1", None, ":plugin"),  # pluggy takes any object; it brings nothing
    "module getattr raises": ("def __getattr__(name): raise RuntimeError(name)", "RuntimeError", ""),
    "property raises": (
        "class P:\n    @property\n    def kvpolicy_register_components(self): raise RuntimeError('prop')\nplugin = P()",
        "RuntimeError: prop", ":plugin",
    ),
    "API version of the future": ("kvpolicy_api = 99", "written for plugin API 99", ""),
    "API version in words": ("kvpolicy_api = 'x' * 10**5", "written for plugin API 'xxx", ""),
    "API version true": ("kvpolicy_api = True", "written for plugin API True", ""),
    "API version that lies": (
        (
            "class V:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
            "    def __hash__(self): return 1\n    def __repr__(self): raise RuntimeError\nkvpolicy_api = V()"
        ),
        "written for plugin API a V", "",
    ),
    "misspelt hook": (
        HEAD + "@hookimpl\ndef kvpolicy_register_component(register): pass\n",
        "there is no hook 'kvpolicy_register_component'. Did you mean 'kvpolicy_register_components'?", "",
    ),
    "undecorated hook": (HEAD + "def kvpolicy_register_policies(register): pass\n", "is not decorated", ""),
    "two arguments": (
        HEAD + "@hookimpl\ndef kvpolicy_register_components(register, more): pass\n", "PluginValidationError", "",
    ),
    "hook is a class": (
        HEAD + "@hookimpl\nclass kvpolicy_register_components: pass\n", "kvpolicy_register_components", "",
    ),
    "hook raises": (COMPONENTS + body("raise KeyError('x')"), "KeyError: 'x'", ""),
    "hook exits": (COMPONENTS + body("import sys; sys.exit(0)"), "SystemExit: 0", ""),
    "register with one argument": (COMPONENTS + body("register(Mine)"), "TypeError", ""),
    "register with three arguments": (COMPONENTS + body("register('mine', Mine, 1)"), "TypeError", ""),
    "an instance": (COMPONENTS + body("register('mine', Mine())"), "is not a component", ""),
    "a function": (COMPONENTS + body("register('mine', lambda view: 0)"), "is not a component", ""),
    "the abstract base": (COMPONENTS + body("register('mine', ImportanceScorer)"), "is abstract; implement score", ""),
    "None": (COMPONENTS + body("register('mine', None)"), "None is not a component", ""),
    "a class that cannot be printed": (
        COMPONENTS + body("""
            class M(type):
                def __repr__(cls): raise RuntimeError('no')
            class C(metaclass=M): pass
            register('mine', C)
        """), "<M instance at", "",
    ),
    "name is a number": (COMPONENTS + body("register(7, Mine)"), "7 is not a component name", ""),
    "name is None": (COMPONENTS + body("register(None, Mine)"), "None is not a component name", ""),
    "name is bytes": (COMPONENTS + body("register(b'mine', Mine)"), "b'mine' is not a component name", ""),
    "name is huge": (COMPONENTS + body("register('a' * 10**6, Mine)"), "is not a component name; use at most 64", ""),
    "name is a path": (COMPONENTS + body("register('../mine', Mine)"), "'../mine' is not a component name", ""),
    "name has a line break": (COMPONENTS + body("register('mine\\n', Mine)"), "is not a component name", ""),
    "name is empty": (COMPONENTS + body("register('', Mine)"), "'' is not a component name", ""),
    "twice the same": (COMPONENTS + body("register('mine', Mine); register('mine', Mine)"), "is registered twice", ""),
    "a parameter called use": (
        HEAD + "class Bad(Mine):\n    use: int = 1\n@hookimpl\ndef kvpolicy_register_components(register):\n"
        + body("register('mine', Bad)"), "cannot be called 'use'", "",
    ),
    "registers without end": (
        COMPONENTS + body("""
            n = 0
            while True:
                n += 1
                register(f'mine_{n}', Mine)
        """), "it registers more than 1,000 names; register each component and policy once", "",
    ),
    "registers without end and catches": (
        COMPONENTS + body("""
            while True:
                try:
                    register('mine', Mine)
                except Exception:
                    pass
        """), "it registers more than 1,000 names", "",
    ),
    "registers without end and catches everything": (
        COMPONENTS + body("""
            while True:
                try:
                    register('mine', Mine)
                except:
                    pass
        """), "it registers more than 1,000 names", "",
    ),
    "looks up what is being loaded": (
        COMPONENTS + body("""
            import kvpolicy
            register('mine', type(kvpolicy.load('rkv').build().importance))
        """), "the catalog is asked for while it is being loaded", "",
    ),
    "policies without end": (
        POLICIES + body("""
            n = 0
            while True:
                n += 1
                register(f'mine-{n}', 'schema_version: 1\\n')
        """), "it registers more than 1,000 names", "",
    ),
    "policy file is missing": (POLICIES + body("register('mine', '/not/there.yaml')"), "there is no file", ""),
    "policy path is huge": (POLICIES + body("register('mine', 'x' * 10**5)"), "there is no file 'xxx", ""),
    "policy is a folder": (POLICIES + body("register('mine', '/')"), "there is no file '/'", ""),
    "policy is a number": (POLICIES + body("register('mine', 3)"), "3 is neither a path nor YAML text", ""),
    "policy name is bad": (POLICIES + body("register('My Policy', 'a:\\n')"), "'My Policy' is not a policy name", ""),
}  # fmt: skip


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def add(source, attribute="", plugin="bad-plugin", dist="bad-dist"):
        module = f"plugin_{uuid.uuid4().hex}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kvpolicy]\n{plugin} = {module}{attribute}\n")

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def bad(catalog):
    return [f.error for f in catalog.failures if f.origin.distribution == "bad-dist"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", BAD)
def test_a_bad_plugin_is_named_and_the_rest_works(what, install):
    source, reason, attribute = BAD[what]
    install(source, attribute)
    install(COMPONENTS + body("register('a_good_one', Mine)"), plugin="good-plugin", dist="good-dist")
    catalog = installed.load_catalog()
    assert "a_good_one" in catalog.names("importance")
    assert "key_norm" in catalog.names("importance")
    assert "mine" not in catalog.names("importance")
    errors = [str(error) for error in bad(catalog)]
    if reason is None:
        assert not errors
        return
    (message,) = errors
    assert message.startswith("plugin 'bad-plugin' of bad-dist 1.0 failed to load: ")
    assert reason in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    with installed.using(catalog):
        assert kvpolicy.load("rkv").policy == "rkv"
        with pytest.raises(KVPolicyError, match=r"'bad-plugin' of bad-dist 1\.0 failed to load"):
            kvpolicy.load("rkv").replace("importance", "mine")


def test_a_collision_names_both_sides_and_the_way_out(install, monkeypatch):
    install(COMPONENTS + body("register('key_norm', Mine)"))
    with pytest.raises(PluginError) as caught:
        installed.load_catalog()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for words in ("kvpolicy", "bad-dist 1.0 (bad-plugin)", "KVPOLICY_DISABLED_PLUGINS=bad-plugin"):
        assert words in message
    monkeypatch.setenv("KVPOLICY_DISABLED_PLUGINS", "bad-plugin")
    assert installed.load_catalog().entry("importance", "key_norm").origin.distribution == "kvpolicy"


def collision(install, **second):
    install(COMPONENTS + body("register('the_same', Mine)"), plugin="first", dist="first-dist")
    install(COMPONENTS + body("register('the_same', Mine)"), **second)
    with pytest.raises(PluginError) as caught:
        installed.load_catalog()
    return str(caught.value)


def test_a_bundled_plugin_is_known_by_its_package_not_by_its_name(install):
    install(COMPONENTS + body("register('key_norm', Mine)"), plugin="builtin-z")
    with pytest.raises(PluginError, match="turn one plugin off with KVPOLICY_DISABLED_PLUGINS=builtin-z"):
        installed.load_catalog()


def test_nobody_is_told_to_turn_off_both(install):
    message = collision(install, plugin="first", dist="second-dist")
    assert message.endswith("rename one, or uninstall one of the packages.")


@pytest.mark.parametrize("broken", [b"[kvpolicy]\nnothing\n", b"[console_scripts]\nx\n", b"\xff\xfe[\n"])
def test_a_broken_list_of_entry_points_is_named_and_the_rest_works(install, tmp_path, broken):
    install(COMPONENTS + body("register('a_good_one', Mine)"), plugin="good-plugin", dist="good-dist")
    info = tmp_path / "bad_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(broken)
    catalog = installed.load_catalog()
    assert {"a_good_one", "key_norm"} <= set(catalog.names("importance"))
    (error,) = bad(catalog)
    assert str(error).startswith("bad-dist 1.0: its entry_points.txt cannot be read (")
    assert str(error).endswith("reinstall the package.")


def test_a_package_may_load_a_policy_while_it_is_imported(install, tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "_process_catalogs", [])
    package = tmp_path / f"package_{uuid.uuid4().hex}"
    package.mkdir()
    (package / "__init__.py").write_text("import kvpolicy\nDEFAULT = kvpolicy.load('rkv')\n")
    (package / "scorer.py").write_text(HEAD)
    hook = f"from {package.name}.scorer import Mine\nregister('mine', Mine)"
    install("from kvpolicy import hookimpl\n@hookimpl\ndef kvpolicy_register_components(register):\n" + body(hook))
    found = []
    thread = threading.Thread(target=lambda: found.append(importlib.import_module(package.name)), daemon=True)
    thread.start()
    thread.join(60)
    assert found
    assert found[0].DEFAULT.policy == "rkv"
    assert "mine" in kvpolicy.catalog().names("importance")


def test_a_bad_policy_file_is_named_when_it_is_used(install):
    install(POLICIES + body("register('mine', 'schema_version: 1\\npolicy: other\\nextends: rkv\\n')"))
    catalog = installed.load_catalog()
    assert not bad(catalog)
    with installed.using(catalog), pytest.raises(KVPolicyError, match=r"<mine of bad-dist.*registered as 'mine'"):
        kvpolicy.load("mine")


def test_keyboard_interrupt_is_not_swallowed(install):
    install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        installed.load_catalog()


def test_threads_share_one_catalog(install, monkeypatch):
    monkeypatch.setattr(installed, "_process_catalogs", [])
    install("raise RuntimeError('boom')")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=lambda: found.append(kvpolicy.catalog())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    assert len({id(catalog) for catalog in found}) == 1


class Plain(kvpolicy.ImportanceScorer):
    def score(self, view):
        return view.positions.float()


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()), st.just(Plain), st.just(Plain()), st.just(kvpolicy.ImportanceScorer),
    st.from_regex(r"[a-z][a-z0-9_]{0,70}", fullmatch=True),
)  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), ANYTHING, ANYTHING), max_size=5))
def test_registering_anything_works_or_is_refused_in_a_sentence(calls):
    catalog = kvpolicy.Catalog()
    for is_policy, name, what in calls:
        message = ""
        try:
            (catalog.register_policy if is_policy else catalog.register)(name, what)
        except PluginError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1
        assert len(message) < 600
        assert message or len(name) <= 64
