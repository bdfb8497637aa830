"""Every law fails on something that is broken, and everything that is broken is caught, as docs/mutations.md says."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType

import pytest

from kvpolicy.testing import LAWS
from kvpolicy.testing.checking import check, subject_of
from kvsupport.documents import generated, laws_text, mutations_in, mutations_text
from kvsupport.mutants import MUTANTS, Caught, run, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
REWRITE = "the page is stale; run scripts/mutate.py"


@pytest.fixture(scope="module")
def rows():
    return mutations_in((DOCS / "mutations.md").read_text(encoding="utf-8"))


def _key(mutant):
    subject = subject_of(mutant.subject() if isinstance(mutant.subject, FunctionType) else mutant.subject)
    return (f"core, under `{subject.name}`" if subject.kind == "policy" else subject.kind, mutant.name)


def test_the_table_holds_all_mutants_and_each_is_caught(rows):
    assert list(rows) == [_key(mutant) for mutant in MUTANTS], REWRITE
    assert not [key for key, laws in rows.items() if not laws]


def test_every_law_catches_something(rows):
    assert {law for laws in rows.values() for law in laws} == set(LAWS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.name}-{i}" for i, m in enumerate(MUTANTS)])
def test_mutant_is_caught(rows, mutant):
    laws = rows[_key(mutant)]
    assert set(laws) <= set(LAWS), REWRITE
    caught = set(run(mutant, [LAWS[name] for name in laws]).laws)
    # The twenty examples are not the same on every machine (rounding decides some), and may miss it on one of them.
    missed = [LAWS[name] for name in laws if name not in caught]
    if missed:
        caught |= set(run(mutant, missed, "thorough").laws)
    assert caught == set(laws), REWRITE


@pytest.mark.slow
def test_the_table_is_what_the_script_writes():
    page = (DOCS / "mutations.md").read_text(encoding="utf-8")
    assert generated(page) == mutations_text(table()), REWRITE


def test_the_list_of_laws_is_what_the_script_writes():
    page = (DOCS / "laws.md").read_text(encoding="utf-8")
    assert generated(page) == laws_text(), REWRITE


def test_an_uncaught_mutant_shows():
    assert "**nothing**" in mutations_text([Caught(MUTANTS[0], "importance", ())])


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_laws_are_documented(law):
    assert law.text.endswith(".")
    assert law.reason.endswith(".")
    assert "\n" not in law.reason
    assert (law.draws is None) == (law.effort == 0 or law.machine is not None)


def test_what_is_not_broken_is_not_caught():
    results = check(subject_of("rkv"), laws=[LAWS["engine_row_alone"], LAWS["state_moves_with_slots"]])
    assert [r.status for r in results] == ["passed", "passed"]
