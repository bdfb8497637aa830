"""Public names that are imported at first use, whatever has loaded the package."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader

import kvpolicy


class NoSource:
    """As pytest loads the packages of plugins that are installed from wheels: it has `get_data` only."""

    def __init__(self, path: str) -> None:
        self.inner = SourceFileLoader("kvpolicy", path)
        self.create_module, self.exec_module, self.get_data = (
            self.inner.create_module, self.inner.exec_module, self.inner.get_data,
        )  # fmt: skip


def test_a_loader_without_source_is_served(monkeypatch):
    path = kvpolicy.__file__
    spec = importlib.util.spec_from_file_location(
        "kvpolicy", path, loader=NoSource(path), submodule_search_locations=list(kvpolicy.__path__)
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kvpolicy", module)
    spec.loader.exec_module(module)
    assert module.PolicySpec is kvpolicy.PolicySpec
