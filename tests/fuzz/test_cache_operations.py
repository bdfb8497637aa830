"""Random sequences of everything that can be done to a cache: right by the oracle, or refused with CacheStateError."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

import kvpolicy
from kvpolicy import PolicySpec
from kvpolicy.errors import CacheStateError, KVPolicyError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvsupport.oracle import compare
from kvsupport.trace import TracedCache

BASE = {
    "policy": "fuzz", "budget": 14, "trigger": {"every": 5}, "protect": {"sinks": 2, "recent": 4},
    "importance": {"use": "window_attention", "observe": 4, "smooth": 3}, "redundancy": "key_cosine",
    "mixer": {"use": "linear", "weight": 0.1},
}  # fmt: skip
PLAIN = {"redundancy": "none", "mixer": "importance_only"}
POLICIES = {
    "rkv": {},
    "h2o": {**PLAIN, "importance": "accumulated_attention"},
    "accumulated, both": {**PLAIN, "importance": "accumulated_attention", "phase": "both", "trigger": "each_step"},
    "re-rotated": {"post": ["rerotate"], "phase": "both"},
    "accumulated, re-rotated": {**PLAIN, "importance": "accumulated_attention", "post": ["rerotate"]},
    "streaming": {**PLAIN, "importance": "recency", "trigger": "each_step", "phase": "both", "post": ["rerotate"]},
    "random": {**PLAIN, "importance": "random"},
    "fraction": {**PLAIN, "importance": "key_norm", "budget": 0.4},
    "prompt only": {"phase": "prefill", "trigger": "each_step"},
    "aligned": {"trigger": {"use": "every", "interval": 3, "align": 4}},
    "one set": {"selector": {"use": "top_k", "scope": "model"}},
    "before rope": {"redundancy": {"use": "key_cosine", "rope": "pre", "threshold": 0.3}, "phase": "both"},
}


@cache
def tiny():
    torch.set_num_threads(1)
    return tiny_model("llama", num_hidden_layers=2)


@cache
def policy_of(name):
    return PolicySpec(**{**BASE, **POLICIES[name]}).build()


@dataclass
class World:
    """A cache and what its user knows: the mask, and where the random tokens come from."""

    cache: TracedCache
    mask: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    draws: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))
    decisions: int = 0

    @property
    def rows(self):
        return len(self.mask)

    def tokens(self, rows, columns):
        return torch.randint(3, 240, (rows, columns), generator=self.draws)

    def run(self, ids, mask):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            tiny()(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        self.mask = mask

    # -- what is done -------------------------------------------------------------------------------------------------

    def turn(self, columns, pads, rows):
        """A prompt, or a new turn; rows are padded on the left by different amounts."""
        rows = self.rows or rows
        new = torch.ones(rows, columns, dtype=torch.long)
        for b in range(rows):
            new[b, : min(pads * b, columns - 1)] = 0
        self.run(self.tokens(rows, columns), torch.cat([self.mask if self.rows else new[:, :0], new], 1))

    def decode(self, steps):
        for _ in range(steps):
            if self.rows:
                self.run(self.tokens(self.rows, 1), torch.cat([self.mask, self.mask.new_ones(self.rows, 1)], 1))

    def crop(self, columns, style):
        columns = min(columns, self.mask.shape[1])
        before, refused = self.held(), ""
        try:
            # transformers 5.23 says how many go, 5.2 how many stay
            self.cache.crop(-columns if style or columns == self.mask.shape[1] else self.mask.shape[1] - columns)
        except CacheStateError as error:
            refused = str(error)
        if refused:
            assert len(refused.splitlines()) == 1
            assert self.held() == before, "a refused crop changed the cache"
        else:
            self.mask = self.mask[:, : self.mask.shape[1] - columns]

    def permute(self, shift):
        index = torch.arange(self.rows).roll(shift)
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]

    def beams(self, choices):
        index = torch.tensor([choice % self.rows for choice in choices[: self.rows]] or [0])
        index = index.repeat(self.rows)[: self.rows]
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]

    def select(self, choices, boolean):
        keep = sorted({choice % self.rows for choice in choices}) or [0]
        index = torch.tensor(keep)
        flags = torch.tensor([b in keep for b in range(self.rows)])
        self.cache.batch_select_indices(flags if boolean else index)
        self.mask = self.mask[index]

    def repeat(self, times):
        if self.rows * times <= 4:
            self.cache.batch_repeat_interleave(times)
            self.mask = self.mask.repeat_interleave(times, 0)

    def reset(self):
        self.judge()
        self.cache.reset()
        self.cache.trace.layers.clear()
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        assert self.cache.stats().seen == 0

    def settle(self):
        if self.cache.trace.events:
            self.cache.settled()

    def fork(self, steps):
        """What a copy goes through leaves the original alone, and the original does the same afterwards."""
        if not self.rows:
            return
        twin, before = self.cache.fork(), self.held()
        assert self.held(twin) == before
        state, mask = self.draws.get_state(), self.mask
        other = World(twin, mask, self.draws)
        other.decode(steps)
        assert self.held() == before, "the copy changed the original"
        self.draws.set_state(state)
        self.decode(steps)
        self.settle()
        if steps:
            twin.stats()  # runs what is due, as `settle` does
            assert self.held(twin) == self.held()
        twin.close()

    # -- what must hold -----------------------------------------------------------------------------------------------

    def held(self, cache=None):
        """Positions by layer, row and head as they are now; nothing that is due is run."""
        engine = (cache or self.cache).engine
        return [
            [store.positions[store.index[i], b, :, : row.resident].tolist() for b, row in enumerate(engine.rows)]
            for i, store in sorted(engine.stores.items())
        ]

    def judge(self):
        self.settle()
        if not self.cache.trace.passes:
            return
        report = compare(self.cache.trace, self.cache.policy)
        assert report.ok, report
        self.decisions += report.decisions
        assert len(report.accepted) <= 1 + report.decisions // 10, report
        lengths = [row.seen for row in self.cache.engine.rows]
        assert lengths == self.mask.sum(1).tolist()
        for layer in self.held():
            for row, seen in zip(layer, lengths, strict=True):
                for positions in row:
                    assert positions == sorted(set(positions))
                    assert not positions or 0 <= positions[0] <= positions[-1] < seen


SEED = int(os.environ.get("KVPOLICY_FUZZ_SEED", "0"))
STEPS = {
    "turn": lambda r: (r.randint(1, 24), r.randint(0, 4), r.randint(1, 3)),
    "decode": lambda r: (r.randint(1, 14),),
    "crop": lambda r: (r.choice([0, 1, 2, 3, 5, 8, 20, 40]), r.random() < 0.5),
    "permute": lambda r: (r.randint(0, 3),),
    "beams": lambda r: (r.choices(range(4), k=4),),
    "select": lambda r: (r.choices(range(4), k=r.randint(1, 4)), r.random() < 0.5),
    "repeat": lambda r: (r.randint(1, 2),),
    "reset": lambda r: (),
    "settle": lambda r: (),
    "fork": lambda r: (r.randint(0, 8),),
}
WEIGHTS = {"turn": 3, "decode": 8, "crop": 4, "reset": 0.5}


def sequence_of(name, number):
    """Return the steps of the sequence with this number: names and arguments."""
    draw = random.Random(f"{SEED}-{name}-{number}")
    names = draw.choices(list(STEPS), [WEIGHTS.get(step, 1) for step in STEPS], k=draw.randint(3, 14))
    return [(step, STEPS[step](draw)) for step in ["turn", *names]]


def play(name, sequence):
    """Do what a sequence says and judge it; return how many times a head was compacted."""
    with TracedCache(policy_of(name), tiny(), outputs=True) as traced:
        world = World(traced)
        for step, arguments in sequence:
            if world.rows or step in ("turn", "reset", "settle"):
                getattr(world, step)(*arguments)
            if world.mask.shape[1] > 70:
                break
        world.judge()
        return world.decisions


def shortened(name, sequence):
    """Leave out steps as long as it still fails."""
    for i in reversed(range(len(sequence))):
        shorter = sequence[:i] + sequence[i + 1 :]
        try:
            play(name, shorter)
        except Exception:  # noqa: BLE001 - whatever it is
            sequence = shorter
    return sequence


def many(name, numbers):
    decisions = 0
    for number in numbers:
        sequence = sequence_of(name, number)
        try:
            decisions += play(name, sequence)
        except Exception as error:
            steps = shortened(name, sequence)
            raise AssertionError(f"{name}, sequence {number}, seed {SEED}: {steps}: {error}") from error
    print(f"{name}: {len(numbers)} sequences, {decisions} decisions")
    assert decisions > 4 * len(numbers)


@pytest.mark.parametrize("name", POLICIES)
def test_any_sequence_is_right_or_refused(name):
    many(name, range(10))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", POLICIES)
def test_many_sequences_are_right_or_refused(name):
    many(name, range(10, 210))


NONSENSE = {
    "crop more than there is": lambda c: c.crop(-1000),
    "crop behind the compaction": lambda c: c.crop(1),
    "reorder beyond the rows": lambda c: c.reorder_cache(torch.tensor([0, 7])),
    "reorder to negative rows": lambda c: c.reorder_cache(torch.tensor([0, -1])),
    "select beyond the rows": lambda c: c.batch_select_indices(torch.tensor([2])),
    "select by a mask of another length": lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
    "select nothing": lambda c: c.batch_select_indices(torch.tensor([], dtype=torch.long)),
    "repeat no time": lambda c: c.batch_repeat_interleave(0),
    "repeat backwards": lambda c: c.batch_repeat_interleave(-1),
    "kept of a missing layer": lambda c: c.kept(99, 0),
    "kept of a missing head": lambda c: c.kept(0, 99),
    "kept of a missing row": lambda c: c.kept(0, 0, 99),
    "kept of a negative row": lambda c: c.kept(0, 0, -1),
    "prefill in chunks of 0": lambda c: c.prefill(torch.ones(2, 90, dtype=torch.long), chunk=0),
    "prefill of what was seen": lambda c: c.prefill(torch.ones(2, 3, dtype=torch.long), chunk=2),
    "another batch size": lambda c: step(c, 3, 1),
    "a mask that is too short": lambda c: step(c, 2, 1, short=4),
    "a mask of other rows": lambda c: step(c, 2, 1, masked=3),
}


def step(cache, rows, columns, short=0, masked=None):
    mask = torch.ones(masked or rows, max(cache.get_seq_length() + columns - short, 1), dtype=torch.long)
    with torch.no_grad():
        tiny()(torch.full((rows, columns), 9), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_and_changes_nothing(what):
    with TracedCache(policy_of("rkv"), tiny()) as traced:
        world = World(traced)
        world.turn(20, 3, 2)
        world.decode(12)
        world.settle()
        before, rows = world.held(), [vars(row).copy() for row in traced.engine.rows]
        with pytest.raises(CacheStateError) as caught:
            NONSENSE[what](traced)
        assert len(str(caught.value).splitlines()) == 1
        assert world.held() == before
        assert [vars(row) for row in traced.engine.rows] == rows
        world.decode(9)
        world.judge()


def test_a_closed_cache_says_so():
    traced = TracedCache(policy_of("rkv"), tiny())
    world = World(traced)
    world.turn(20, 0, 1)
    traced.close()
    traced.close()
    for use in (traced.fork, traced.__enter__):
        with pytest.raises(CacheStateError, match="closed"):
            use()
    with pytest.raises((CacheStateError, UnsupportedError)):
        world.decode(1)
    assert traced.kept(0, 0) == list(range(20))


def test_an_empty_cache_can_be_asked_anything():
    with PolicyCache(policy_of("h2o"), tiny()) as empty:
        assert empty.stats().seen == 0
        assert empty.get_seq_length() == 0
        empty.reset()
        empty.crop(0)
        assert empty.fork().stats().seen == 0
        for use in (lambda: empty.kept(0, 0), lambda: empty.crop(-1)):
            with pytest.raises(KVPolicyError) as caught:
                use()
            assert len(str(caught.value).splitlines()) == 1
    assert kvpolicy.__version__
