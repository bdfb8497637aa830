"""What a paged cache refuses, and requests that share a prefix."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy import PolicySpec
from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import PagedCache, unserved_traits
from kvpolicy.cache.store import Layout
from kvpolicy.cache.store.paged import PagedStore
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.paged import DIM, FACTS, HEADS, LAYERS, MODEL_LAYERS, ROPES, VALUE_DIM, text


def policy(**fields):
    base = {
        "policy": "test", "budget": 16, "trigger": {"every": 4}, "protect": {"sinks": 2, "recent": 4},
        "importance": "key_norm",
    }  # fmt: skip
    return PolicySpec(**{**base, **fields}).build()


def make(**fields) -> PagedCache:
    chosen = policy(**fields)
    layout = Layout(LAYERS, HEADS, DIM, VALUE_DIM, torch.float32, torch.device("cpu"), chosen.slot_states)
    return PagedCache(chosen, PagedStore.allocate(layout, 32, 4), MODEL_LAYERS, ROPES)


def feed(cache: PagedCache, **step: Incoming):
    """One step; what a token brings is that of request `r0` at its position, so that all rows begin alike."""
    opened = cache.open(step)
    at = opened.packed.positions.long()
    for i, layer in enumerate(LAYERS):
        keys, values, queries = (tensor[i][:, at].transpose(0, 1) for tensor in text("r0"))
        cache.append(layer, keys, values)
        cache.record(layer, queries, FACTS)
    return opened


@pytest.mark.parametrize(
    ("name", "trait"),
    [("adakv-snapkv", "equal_counts"), ("pyramidkv", "equal_counts"), ("threshold", "equal_counts"),
     ("finch", "re_rotates"), ("compactor", "whole_prompt")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_its_trait(name, trait):
    layout = Layout(LAYERS, HEADS, DIM, VALUE_DIM, torch.float32, torch.device("cpu"))
    with stand_in_tables(), pytest.raises(UnsupportedError, match=f"'{name}' cannot be served .* .trait {trait}."):
        PagedCache(kvpolicy.load(name).build(), PagedStore.allocate(layout, 4, 4), MODEL_LAYERS, ROPES)


def test_traits_are_those_of_the_policy_and_nothing_else():
    """A registered policy is refused for what it is: counts, positions, prompts in one piece, images."""
    for entry in kvpolicy.catalog().policies():
        with stand_in_tables():
            loaded = kvpolicy.load(entry.name).build()
        wanted = {
            "equal_counts": loaded.counts != "equal",
            "re_rotates": any(post.changes == "positions" for post in loaded.post),
            "whole_prompt": any(c.whole_prompt for c in loaded.components),
            "modality": "modality" in loaded.needs,
            "hidden_states": "hidden_states" in loaded.needs,
        }
        assert set(unserved_traits(loaded)) == {name for name, there in wanted.items() if there}


def test_a_shared_prefix_is_read_by_both_and_written_by_none():
    cache = make(importance={"use": "window_attention", "observe": 4})
    cache.bind("a", range(4))
    feed(cache, a=Incoming(14, "prompt"))
    cache.bind("b", [0, 1, 2], 12)
    cache.extend("b", [8])
    cache.bind("c", range(12, 16))
    feed(cache, b=Incoming(2, "prompt"), c=Incoming(14, "prompt"))
    cache.extend("b", [9, 10])
    cache.extend("c", [16, 17])
    for _ in range(6):
        feed(cache, b=Incoming(1), c=Incoming(1))
    step = {"b": Incoming(1), "c": Incoming(1)}
    assert cache.shared(step) == {"b": [1, 2]}
    for block, to in ((1, 20), (2, 21)):
        cache.copy("b", block, to)
    assert cache.shared(step) == {}
    assert feed(cache, **step).freed == {"c": (12,)}, "a reads the first block of b still"
    for layer in LAYERS:
        rows = [cache.store.read(layer, cache._rows([name])) for name in ("b", "c")]
        assert torch.equal(rows[0].positions, rows[1].positions)
        assert torch.equal(rows[0].keys, rows[1].keys)
        held = cache.store.read(layer, cache._rows(["a"]))
        assert torch.equal(held.keys[0], text("r0").keys[LAYERS.index(layer)][:, :14])


def test_a_prefix_without_the_queries_that_are_looked_at_is_refused():
    cache = make(
        importance={"use": "window_attention", "observe": 8}, budget=8, protect={"recent": 4}, trigger="each_step"
    )
    cache.bind("a", range(4))
    feed(cache, a=Incoming(12, "prompt"))
    cache.bind("b", [0, 1, 2], 12)
    cache.extend("b", [8])
    feed(cache, b=Incoming(1))
    with pytest.raises(CacheStateError, match="looks at the last 8 queries, but only 1 have been computed"):
        feed(cache, b=Incoming(1))


def test_a_policy_that_must_see_every_query_refuses_a_shared_prefix():
    cache = make(importance="accumulated_attention")
    cache.bind("a", range(4))
    feed(cache, a=Incoming(12, "prompt"))
    with pytest.raises(UnsupportedError, match=r"need attention.*prefix caching off"):
        cache.bind("b", [0, 1, 2], 12)
    assert "b" not in cache.store.tables


def test_prompt_pieces_and_candidates_that_are_too_wide_are_refused():
    cache = make(phase="both", prefill_chunk=8)
    cache.bind("a", range(4))
    with pytest.raises(UnsupportedError, match="pieces of 8 tokens, but 9 came"):
        cache.open({"a": Incoming(9, "prompt")})
    cache = make(importance={"use": "window_attention", "observe": 4})
    cache.bind("a", range(4))
    with pytest.raises(UnsupportedError, match="2 candidates come at once, but at most 0"):
        cache.open({"a": Incoming(2, "verify")})


def test_a_step_that_stopped_is_noticed():
    cache = make()
    cache.bind("a", range(4))
    cache.open({"a": Incoming(3, "prompt")})
    with pytest.raises(CacheStateError, match="stopped before layer 0"):
        cache.open({"a": Incoming(1)})
