"""What transformers calls a cache: both names are found, and the right one is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.runtimes.hf.naming import NAMES, passed, passing


def newer(self, input_ids, *, cache=None, use_cache=None): ...


def older(self, input_ids, *, past_key_values=None, use_cache=None): ...


def either(self, **kwargs): ...


def test_a_function_is_given_the_cache_by_the_name_that_it_knows():
    assert passing(1, newer) == {"cache": 1}
    assert passing(1, older) == {"past_key_values": 1}
    assert passing(1, either) == passing(1)
    assert set(passing(1)) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_under_both_names(name):
    assert passed({name: 1, "use_cache": True}) == 1
    assert passed({"use_cache": True}) is None
    assert passed(dict.fromkeys(NAMES)) is None


def test_the_names_are_written_in_one_place():
    """Under transformers 5.24 the older name warns, and under 5.23 the newer one is an error."""
    package = Path(kvpolicy.__file__).parent
    written = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "naming.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"past_key_values=\w", line)
        and "``" not in line
        and not line.strip().startswith("model.generate(")
    ]
    assert not written


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_its_cache_as_the_policy_only(name, tiny, compose):
    model = tiny()
    with PolicyCache(compose(), model) as cache, pytest.raises(UnsupportedError, match=f"^{name}: a PolicyCache"):
        generate(model, {"input_ids": model.dummy_inputs["input_ids"]}, compose(), **{name: cache})
