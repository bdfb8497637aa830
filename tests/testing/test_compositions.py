"""Laws on policies that nobody has written: drawn compositions of everything that is registered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.testing import LAWS, policy_specs
from kvpolicy.testing.checking import check, subject_of
from kvpolicy.testing.laws import exceptions_of
from kvpolicy.testing.tables import stand_in_tables

EVERY = [law for law in LAWS.values() if "policy" in law.kinds and law.effort]
DRAWN = [law for law in EVERY if law.draws is not None]


@settings(max_examples=60)
@given(spec=policy_specs(), data=st.data())
def test_drawn_compositions_obey(spec, data):
    with stand_in_tables():
        policy = subject_of(spec).what
        excused = exceptions_of(policy)
        for law in data.draw(st.lists(st.sampled_from(DRAWN), min_size=3, max_size=6, unique=True)):
            if law.name not in excused and (law.unless is None or law.unless(policy) is None):
                law.holds(policy, **data.draw(law.draws(policy)))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_shared_scopes_obey(scope):
    spec = kvpolicy.load("rkv").replace("selector.scope", scope)
    results = {r.law: r for r in check(subject_of(spec), laws=EVERY)}
    for result in results.values():
        result.expect()
    assert results["shared_scope_shares"].status == "passed"


def test_rows_of_a_ragged_cache_are_compacted_alone():
    spec = kvpolicy.PolicySpec(
        policy="ragged",
        budget=8,
        phase="both",
        trigger={"every": 5},
        importance="attention_memory",
        allocator="pyramid",
    )
    policy = subject_of(spec).what
    for law in ("evicted_stays_evicted", "engine_row_alone", "choice_is_carried_out"):
        LAWS[law].holds(policy, prompts=(5, 10, 8), seed=81, steps=12)
