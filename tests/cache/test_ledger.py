"""Counters of rows and when they are due, in plain integers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

import kvpolicy
from kvpolicy.cache.ledger import Incoming, Ledger
from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.trigger import Trigger
from kvpolicy.errors import CacheStateError
from kvpolicy_plugins.triggers.every import Every


@dataclass(frozen=True)
class Plain:
    """All that a ledger reads of a policy."""

    budget: Budget = field(default_factory=lambda: Budget(tokens=16))
    trigger: Trigger = field(default_factory=lambda: Every(interval=4))
    phase: Literal["prefill", "decode", "both"] = "decode"
    name: str = "plain"

    def entries(self, seen: int, prompt_length: int) -> int:
        return self.budget.entries(seen, 0)


def step(ledger, **rows):
    """One step of requests by name: an int is a decode step of so many tokens, a pair names the kind."""
    incoming = {name: Incoming(*what) if isinstance(what, tuple) else Incoming(what) for name, what in rows.items()}
    due = ledger.due(incoming)
    for row in due:
        ledger.compacted(row)
    ledger.advance(incoming)
    return due


def test_rows_come_grow_are_compacted_and_go():
    ledger: Ledger[str] = Ledger(Plain())
    assert step(ledger, a=(15, "prompt")) == []
    assert [step(ledger, a=1) for _ in range(5)] == [[]] * 5
    assert ledger.resident("a") == ledger.position("a") == 20
    assert step(ledger, a=1, b=(30, "prompt")) == ["a"]
    assert (ledger.resident("a"), ledger.position("a")) == (17, 21)
    assert (ledger.resident("b"), ledger.position("b")) == (30, 30)
    ledger.drop("a")
    assert list(ledger.rows) == ["b"]
    # The phase is decode: a prompt alone is not compacted, the first token behind it may be.
    assert step(ledger, b=1) == []
    assert step(ledger, b=1) == ["b"]
    assert (ledger.rows["b"].prompt, ledger.rows["b"].compactions, ledger.resident("b")) == (30, 1, 17)


def test_a_row_that_sits_a_step_out_is_as_it_was():
    ledger: Ledger[str] = Ledger(Plain(phase="both"))
    step(ledger, a=(20, "prompt"), b=(20, "prompt"))
    before = ledger.rows["b"]
    assert step(ledger, a=1, b=0) == ["a"]
    assert ledger.rows["b"] == before
    assert step(ledger, a=1, b=1) == ["b"]


def test_tokens_are_not_counted_before_a_due_row_is_compacted():
    ledger: Ledger[str] = Ledger(Plain())
    step(ledger, a=(19, "prompt"))
    step(ledger, a=1)
    assert ledger.due({"a": Incoming(1)}) == ["a"]
    with pytest.raises(CacheStateError, match="row 'a' is due for a compaction under policy 'plain'"):
        ledger.advance({"a": Incoming(1)})
    ledger.compacted("a")
    ledger.advance({"a": Incoming(1)})
    assert ledger.resident("a") == 17


def test_what_was_kept_counts_where_it_is_said():
    ledger: Ledger[str] = Ledger(Plain())
    step(ledger, a=(20, "prompt"))
    step(ledger, a=1)
    assert ledger.compacted("a", 9) == ledger.resident("a") == 9


def test_a_retraction_goes_back_to_the_last_compaction():
    ledger: Ledger[str] = Ledger(Plain())
    step(ledger, a=(18, "prompt"))
    for _ in range(5):
        step(ledger, a=1)
    assert ledger.rows["a"].floor == 20
    ledger.retract("a", 3)
    assert (ledger.resident("a"), ledger.position("a")) == (16, 20)
    with pytest.raises(CacheStateError, match=r"1 tokens back .* at token 20 of 20"):
        ledger.retract("a", 1)


def test_a_retraction_to_the_prompt_opens_it_again():
    ledger: Ledger[str] = Ledger(Plain())
    step(ledger, a=(5, "prompt"))
    step(ledger, a=(3, "verify"))
    assert (ledger.rows["a"].decoding, ledger.rows["a"].prompt) == (True, 5)
    ledger.retract("a", 3)
    assert not ledger.rows["a"].decoding
    step(ledger, a=(2, "prompt"))
    assert ledger.rows["a"].prompt == 7


def test_hidden_tokens_have_no_position():
    ledger: Ledger[str] = Ledger(Plain())
    step(ledger, a=(10, "prompt"))
    ledger.hide("a", 4, 4)
    row = ledger.rows["a"]
    assert (row.resident, row.seen, row.prompt, row.floor) == (6, 6, 6, 6)


def test_rotations_lag_behind_where_kept_keys_are_turned():
    ledger: Ledger[str] = Ledger(Plain(), re_rotates=True)
    step(ledger, a=(19, "prompt"))
    step(ledger, a=1)
    step(ledger, a=1)
    assert ledger.rows["a"].shift == 20 - 16


@pytest.mark.parametrize("name", ["rkv", "sinks-recent", "h2o", "snapkv-prefill", "full"])
def test_so_many_tokens_at_once_do_not_move_a_compaction(name):
    """`room` tokens in one step, and one by one: compacted at the same tokens."""
    policy = kvpolicy.load(name) if name == "full" else kvpolicy.load(name, budget=80)
    together, single = Ledger(policy.build()), Ledger(policy.build())
    at: tuple[list[int], list[int]] = ([], [])
    for ledger in (together, single):
        step(ledger, a=(30, "prompt"))
    while together.position("a") < 400:
        for row in together.due({"a": Incoming(1)}):
            together.compacted(row)
            at[0].append(together.position("a"))
        many = together.room("a", 64)
        step(together, a=(many, "verify"))
    while single.position("a") < together.position("a"):
        if step(single, a=1):
            at[1].append(single.position("a") - 1)
    assert at[0] == at[1]


def test_a_scheduler_needs_no_torch():
    code = """
import sys
from dataclasses import dataclass
from kvpolicy.cache.ledger import Incoming, Ledger
from kvpolicy.contracts.budget import Budget
from kvpolicy_plugins.triggers.every import Every

class Plain:
    name, budget, trigger, phase = "plain", Budget(tokens=64), Every(interval=32), "both"
    def entries(self, seen, prompt_length):
        return self.budget.entries(seen, 0)

ledger = Ledger(Plain())
for i in range(1000):
    now = {"a": Incoming(200 if i == 0 else 1, "prompt" if i == 0 else "decode")}
    for row in ledger.due(now):
        ledger.compacted(row)
    ledger.advance(now)
assert ledger.position("a") == 1199 and ledger.resident("a") <= 96, ledger.rows
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_pieces_of_one_prompt_are_compacted_when_it_is_complete_or_room_is_short():
    """Who gives a room cuts prompts as he likes; without one the pieces are what the policy is asked about."""
    found = {}
    for room in (None, 100, 40):
        ledger: Ledger[str] = Ledger(Plain(phase="both"), prompt_room=room)
        found[room] = [step(ledger, a=(18, "prompt")) for _ in range(3)] + [step(ledger, a=1)]
    assert found == {
        None: [[], ["a"], ["a"], ["a"]],
        100: [[], [], [], ["a"]],
        40: [[], [], ["a"], ["a"]],
    }


def test_what_a_row_had_decoded_is_read_anew_behind_its_prompt():
    ledger: Ledger[str] = Ledger(Plain())
    ledger.advance({"a": Incoming(7, "prompt", decoded=3)})
    counts = ledger.rows["a"]
    assert (counts.prompt, counts.seen, counts.decoding) == (4, 7, True)
    ledger.advance({"a": Incoming(9)})
    assert (counts.prompt, counts.seen) == (4, 16)
    assert ledger.due({"a": Incoming(6)}) == []
