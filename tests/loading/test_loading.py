from __future__ import annotations

import subprocess
import sys
import textwrap
import uuid
import warnings

import pytest

import kvpolicy
from kvpolicy import Catalog, PluginError, PolicySpec, SpecError, UnknownComponentError
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.loading import installed

COMPONENT = """
from kvpolicy import ImportanceScorer, hookimpl

class Mine(ImportanceScorer):
    def score(self, view):
        return view.keys.norm(dim=-1).float()
"""
GOOD = (
    COMPONENT
    + """
@hookimpl
def kvpolicy_register_components(register):
    register("mine", Mine)
"""
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts a plugin package on the path, as pip would; returns the name of its module."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def add(source, *, plugin="my-plugin", dist="my-dist", version="1.2", attribute=""):
        module = f"plugin_{uuid.uuid4().hex}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        points = info / "entry_points.txt"
        old = points.read_text() if points.exists() else "[kvpolicy]\n"
        points.write_text(f"{old}{plugin} = {module}{attribute}\n")
        return module

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def mine(catalog):
    return [f.error for f in catalog.failures if f.origin.distribution != "kvpolicy"]


def test_a_plugin_enters_by_its_entry_point(install, tmp_path):
    policy = tmp_path / "my-policy.yaml"
    policy.write_text("schema_version: 1\n")
    module = install(
        GOOD
        + f"""
@hookimpl
def kvpolicy_register_policies(register):
    register("my-policy", {str(policy)!r})
    register("my-text", "schema_version: 1\\npolicy: my-text\\n")
"""
    )
    catalog = installed.load_catalog()
    entry = catalog.entry("importance", "mine")
    assert entry.component is sys.modules[module].Mine
    assert str(entry.origin) == "my-dist 1.2 (my-plugin)"
    assert catalog.policy("my-policy").path == policy
    assert catalog.policy("my-text").origin == entry.origin
    assert not mine(catalog)


def test_bundled_plugins_enter_by_the_same_door():
    catalog = installed.load_catalog()
    origin = catalog.entry("importance", "window_attention").origin
    assert (origin.distribution, origin.plugin) == ("kvpolicy", "builtin-plugins")
    assert catalog.policy("rkv").origin.plugin == "builtin-policies"


def test_an_entry_point_may_name_an_object_in_a_module(install):
    install(
        COMPONENT
        + """
class Plugin:
    kvpolicy_api = 1

    @hookimpl
    def kvpolicy_register_components(self, register):
        register("mine", Mine)

plugin = Plugin()
""",
        attribute=":plugin",
    )
    catalog = installed.load_catalog()
    assert not mine(catalog)
    assert "mine" in catalog.names("importance")


BROKEN = {
    "raises at import": ("raise RuntimeError('boom\\nsecond line')", "RuntimeError: boom."),
    "exits at import": ("import sys; sys.exit(3)", "SystemExit: 3."),
    "is not Python": ("def (", "SyntaxError: invalid syntax"),
    "imports what is not there": ("import not_a_module_at_all", "ModuleNotFoundError: No module named"),
    "raises in a hook": (
        COMPONENT + "@hookimpl\ndef kvpolicy_register_components(register):\n    register('mine', Mine)\n    1 / 0\n",
        "ZeroDivisionError: division by zero.",
    ),
    "misspells a hook": (
        COMPONENT + "@hookimpl\ndef kvpolicy_register_component(register): register('mine', Mine)\n",
        "there is no hook 'kvpolicy_register_component'. Did you mean 'kvpolicy_register_components'?",
    ),
    "forgets the decorator": (
        COMPONENT + "def kvpolicy_register_components(register): register('mine', Mine)\n",
        "kvpolicy_register_components is not decorated; write @kvpolicy.hookimpl above it.",
    ),
    "wants other arguments": (
        COMPONENT + "@hookimpl\ndef kvpolicy_register_components(registry): pass\n",
        "PluginValidationError",
    ),
    "registers no component": (
        COMPONENT + "@hookimpl\ndef kvpolicy_register_components(register):\n"
        "    register('mine', Mine)\n    register('other', dict)\n",
        "'other': <class 'dict'> is not a component",
    ),
    "registers a name twice": (
        COMPONENT + "@hookimpl\ndef kvpolicy_register_components(register):\n"
        "    register('mine', Mine)\n    register('mine', Mine)\n",
        "importance 'mine' is registered twice by my-dist 1.2 (my-plugin)",
    ),
    "registers a missing file": (
        COMPONENT + "@hookimpl\ndef kvpolicy_register_components(register): register('mine', Mine)\n"
        "@hookimpl\ndef kvpolicy_register_policies(register): register('p', '/not/there.yaml')\n",
        "policy 'p': there is no file '/not/there.yaml'.",
    ),
    "is for another API": (
        "kvpolicy_api = 2\n" + GOOD,
        "it is written for plugin API 2 and this kvpolicy has plugin API 1; install versions that fit together.",
    ),
    "declares nonsense": ("kvpolicy_api = 'one'\n" + GOOD, "plugin API 'one'"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_and_left_out_whole(install, source, reason):
    install(source)
    install(GOOD.replace('"mine"', '"other"'), plugin="a-good-one", dist="good-dist")
    catalog = installed.load_catalog()
    (error,) = mine(catalog)
    assert str(error).startswith("plugin 'my-plugin' of my-dist 1.2 failed to load: ")
    assert reason in str(error)
    assert "\n" not in str(error)
    assert catalog.names("importance").count("mine") == 0
    assert "other" in catalog.names("importance")
    assert "key_norm" in catalog.names("importance")


def test_the_cause_is_kept(install):
    install(BROKEN["raises at import"][0])
    (error,) = mine(installed.load_catalog())
    assert isinstance(error.__cause__, RuntimeError)


def test_declared_api_version_is_accepted(install):
    install("kvpolicy_api = 1\n" + GOOD)
    assert "mine" in installed.load_catalog().names("importance")


def test_collision_raises_and_can_be_turned_off(install, monkeypatch):
    install(GOOD.replace('"mine"', '"key_norm"'))
    with pytest.raises(PluginError) as caught:
        installed.load_catalog()
    assert "importance 'key_norm' is registered by" in str(caught.value)
    for side in ("(builtin-plugins)", "my-dist 1.2 (my-plugin)", "KVPOLICY_DISABLED_PLUGINS=my-plugin"):
        assert side in str(caught.value)
    monkeypatch.setenv("KVPOLICY_DISABLED_PLUGINS", " other , my-plugin ,")
    catalog = installed.load_catalog()
    assert [str(origin) for origin in catalog.disabled] == ["my-dist 1.2 (my-plugin)"]
    assert catalog.entry("importance", "key_norm").origin.distribution == "kvpolicy"


def test_disabled_plugins_are_not_imported(install, monkeypatch):
    module = install("raise RuntimeError")
    monkeypatch.setenv("KVPOLICY_DISABLED_PLUGINS", "my-plugin")
    assert not mine(installed.load_catalog())
    assert module not in sys.modules


def test_failures_of_two_plugins_are_both_reported(install):
    install("raise RuntimeError('first')", plugin="a")
    install("raise RuntimeError('second')", plugin="b")
    assert [str(e).split(": ")[-1] for e in mine(installed.load_catalog())] == ["first.", "second."]


def test_process_catalog_warns_once_and_tells_where_a_name_is_missing(install, monkeypatch):
    monkeypatch.setattr(installed, "_process_catalogs", [])
    install("raise RuntimeError('boom')")
    with pytest.warns(RuntimeWarning, match="plugin 'my-plugin' of my-dist 1.2 failed to load: RuntimeError: boom"):
        first = kvpolicy.catalog()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kvpolicy.catalog() is first
    with pytest.raises(UnknownComponentError, match=r"'my-plugin' of my-dist 1\.2 failed to load"):
        first.get("importance", "mine")


def test_using_replaces_the_catalog_and_restores_it():
    mine, before = Catalog(), kvpolicy.catalog()
    with installed.using(mine):
        assert kvpolicy.catalog() is mine
    assert kvpolicy.catalog() is before
    with pytest.raises(UnknownComponentError), installed.using(mine):
        kvpolicy.load("rkv")
    assert kvpolicy.catalog() is before


def test_registering_in_this_process():
    class Local(ImportanceScorer):
        def score(self, view):
            raise NotImplementedError

    kvpolicy.catalog().register("local_of_a_test", Local)
    try:
        spec = kvpolicy.load("random").replace("importance", "local_of_a_test")
        assert spec.build().importance == Local()
    finally:
        kvpolicy.catalog().unregister("importance", "local_of_a_test")


def _python(program, cwd):
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plugin_author_needs_no_torch_for_the_decorator(tmp_path):
    seen = _python(
        "import kvpolicy, sys; kvpolicy.hookimpl, kvpolicy.SpecError, kvpolicy.__version__, dir(kvpolicy);"
        "print(*(m for m in sys.modules if m in ('torch', 'pydantic', 'yaml', 'transformers')))",
        tmp_path,
    )
    assert seen.split() == []


def test_plugins_load_at_first_use_only(tmp_path):
    seen = _python(
        "import kvpolicy, sys; from kvpolicy import PolicySpec, Policy, load, json_schema, catalog, CacheView\n"
        "print('kvpolicy_plugins' in sys.modules); kvpolicy.catalog(); print('kvpolicy_plugins' in sys.modules)",
        tmp_path,
    )
    assert seen.split() == ["False", "True"]


def test_every_public_name_exists():
    for name in kvpolicy.__all__:
        assert getattr(kvpolicy, name) is not None
    assert dir(kvpolicy) == kvpolicy.__all__
    assert {"Catalog", "Policy", "__version__", "hookimpl", "load"} < set(kvpolicy.__all__)
    assert "TYPE_CHECKING" not in dir(kvpolicy)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvpolicy.nothing  # noqa: B018


def test_the_plugin_that_ends_the_process_is_the_last_that_was_named(install, tmp_path, monkeypatch):
    install("import os\nos._exit(7)", plugin="z-deadly")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import kvpolicy; kvpolicy.load('rkv')"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    monkeypatch.setenv("KVPOLICY_DEBUG_PLUGINS", "1")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "kvpolicy loads plugin 'z-deadly' of " in done.stderr.splitlines()[-1]
    monkeypatch.setenv("KVPOLICY_DISABLED_PLUGINS", "z-deadly")
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_a_refusal_calls_components_what_files_call_them():
    fields = {"importance": {"use": "critical"}, "redundancy": "key_cosine", "mixer": "z_score"}
    with pytest.raises(SpecError, match="adaptive_heads pools scores, but those of the importance scorer critical are"):
        PolicySpec(policy="z", budget=64, trigger={"every": 16}, allocator="adaptive_heads", **fields).build()
