"""Decode steps as one graph: the same tokens and entries as without, traced once, with nothing read back.

What is compiled here goes through dynamo and runs the traced graph as it is; inductor has a slow test of its own.
The loop that docs/transformers.md shows is the one of these tests.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import kvpolicy
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tables import stand_in_tables

SLOTS = 96  # of policies without a bound


class Graphs:
    """A backend of torch.compile that runs what was traced, and keeps it."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.made.append(graph)
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self  # generate() copies its configuration


@pytest.fixture(autouse=True, scope="module")
def _tables_of_any_model():
    """The shipped tables are of another model."""
    with stand_in_tables():
        yield


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def slots_for(policy) -> bool | int:
    return SLOTS if policy.bound is None else True


def decode(cache, model, inputs, steps, call=None, **more):
    """Decode greedily in a loop of one's own; return the tokens and what is kept."""
    call, rows = model if call is None else call, len(inputs["input_ids"])
    tokens = []
    with torch.no_grad():
        output = model(**inputs, **more, past_key_values=cache)
        for _ in range(steps):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = call(tokens[-1], past_key_values=cache)
    kept = [cache.kept(layer, head, row) for layer in (0, 2) for head in (0, 1) for row in range(rows)]
    return torch.cat(tokens, 1).tolist(), kept


def generated(cache, model, inputs, new=24, **more):
    """Generate greedily; return the tokens and what is kept."""
    more = {"eos_token_id": None, "do_sample": False, **more}
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **more)
    rows = len(inputs["input_ids"])
    return out.tolist(), [cache.kept(layer, head, row) for layer in (0, 2) for head in (0, 1) for row in range(rows)]


def compiling(graphs: Graphs) -> dict[str, Any]:
    config = CompileConfig(fullgraph=True, dynamic=False, backend=graphs, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


def test_every_policy_generates_the_same_or_is_refused_by_name(registered, tiny, small, random_prompts, padded):
    policy, model = small(registered), tiny()
    if policy.reserved(45) >= policy.entries(45, 45) or policy.prefill_chunk:
        inputs = padded(random_prompts(7, 5, 6))  # pinned as a whole, or read in chunks
    else:
        inputs = padded(random_prompts(45, 9, 20))  # longer than the arena, and shorter ones beside it
    if not policy.traits.length_is_counted:
        with pytest.raises(UnsupportedError, match=f"graph: .*{policy.name!r}.*length_is_counted"):
            PolicyCache(policy, model, graph=True)
        return
    if "hidden_states" in policy.needs:
        with pytest.raises(UnsupportedError, match=f"graph: policy {policy.name!r} needs hidden_states"):
            PolicyCache(policy, model, graph=slots_for(policy))
        return
    with PolicyCache(policy, model) as cache:
        expected = generated(cache, model, inputs)
    with PolicyCache(policy, model, graph=slots_for(policy)) as cache:
        assert generated(cache, model, inputs) == expected
        assert cache.engine.steps


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_other_models_do_too(family, attention, tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(family, attention), padded(random_prompts(30, 12))
    with PolicyCache(policy, model) as cache:
        expected = generated(cache, model, inputs)
    with PolicyCache(policy, model, graph=True) as cache:
        assert generated(cache, model, inputs) == expected


def test_a_step_is_traced_once_with_compactions_in_between(graphs, tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(20))
    with PolicyCache(policy, model) as cache:
        expected = decode(cache, model, inputs, 60)
    with PolicyCache(policy, model, graph=True) as cache:
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=graphs)
        assert decode(cache, model, inputs, 60, step) == expected
        assert cache.engine.rows[0].compactions == 7
        assert len(graphs.made) == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        cache.reset()
        assert decode(cache, model, inputs, 20, step)[0] == [expected[0][0][:20]]
    with PolicyCache(policy, model, graph=True) as cache:
        assert decode(cache, model, inputs, 20, step)[0] == [expected[0][0][:20]]
    assert len(graphs.made) == 1  # nor for a cache that is emptied, or another one


def test_a_prompt_that_is_longer_than_the_arena_is_compacted_first(graphs, tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(75))
    with PolicyCache(policy, model) as cache:
        expected = decode(cache, model, inputs, 40)
    with PolicyCache(policy, model, graph=True) as cache:
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=graphs)
        assert decode(cache, model, inputs, 40, step) == expected
        assert cache.engine.stores[0].capacity == policy.bound
    # This policy compacts a prompt behind the first step, which therefore has an arena of its own.
    assert len(graphs.made) == 2
    with PolicyCache(policy, model, graph=80) as cache:
        assert decode(cache, model, inputs, 40, step) == expected
    assert len(graphs.made) == 3  # one of 80 slots, for all steps


@pytest.mark.parametrize("compiled", ["forward", "call", "model"])
def test_whatever_of_a_model_is_compiled(compiled, graphs, tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(20))
    with PolicyCache(policy, model) as cache:
        expected = decode(cache, model, inputs, 12)
    what = {"forward": model.forward, "call": model.__call__, "model": model}
    with PolicyCache(policy, model, graph=True) as cache:
        what["forward"] = model.forward
        step = torch.compile(what[compiled], fullgraph=True, dynamic=False, backend=graphs)
        assert decode(cache, model, inputs, 12, step) == expected
    assert len(graphs.made) == 1


@pytest.mark.parametrize("name", ["rkv", "h2o", "streaming-llm", "full"])
def test_generate_compiles_by_itself(name, graphs, tiny, small, random_prompts, padded):
    policy, model, inputs = small(name), tiny("qwen2"), padded(random_prompts(21, 8))
    with PolicyCache(policy, model) as cache:
        assert not cache.is_compileable
        expected = generated(cache, model, inputs, 30)
    with PolicyCache(policy, model, graph=slots_for(policy)) as cache:
        assert cache.is_compileable
        assert generated(cache, model, inputs, 30, **compiling(graphs)) == expected
        assert len(graphs.made) == 1
        # A second turn, with the mask of everything so far.
        turn = torch.cat([torch.tensor(expected[0]), torch.tensor([[5, 6], [7, 8]])], 1)
        shown = torch.cat([inputs["attention_mask"], torch.ones(2, 32, dtype=torch.int64)], 1)
        generated(cache, model, {"input_ids": turn, "attention_mask": shown}, 5, **compiling(graphs))
    assert len(graphs.made) <= 2  # a turn that does not fit has an arena of its own until the next compaction
    assert not torch._dynamo.utils.counters["graph_break"]


def test_masks_that_grow_with_the_text_do_not_change_the_graph(graphs, tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(20, 7))
    with PolicyCache(policy, model) as cache:
        expected = generated(cache, model, inputs, 20)[0]
    mask = inputs["attention_mask"]
    with torch.no_grad(), PolicyCache(policy, model, graph=True) as cache:
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=graphs)
        output = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        for i in range(20):
            token = output.logits[:, -1:].argmax(-1)
            assert token[:, 0].tolist() == [row[20 + i] for row in expected]
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            output = step(token, attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1, past_key_values=cache)
    assert len(graphs.made) == 1


def test_nothing_of_a_step_is_read_back(graphs, tiny, small):
    """On the device `meta` tensors have no content: whoever reads one gets an error, as the compaction at the end."""
    model = copy.deepcopy(tiny()).to("meta")
    tokens = torch.zeros(2, 20, dtype=torch.int64, device="meta")
    with torch.no_grad():
        try:
            model(tokens)
        except RuntimeError as error:  # the rotary embedding of transformers 5.2
            pytest.skip(str(error))
        cache = PolicyCache(small("rkv"), model, graph=True)
        model(tokens, past_key_values=cache)
        for _ in range(12):
            model(tokens[:, :1], past_key_values=cache)
        assert [row.resident for row in cache.engine.rows] == [32, 32]
        with pytest.raises((NotImplementedError, RuntimeError)):
            model(tokens[:, :1], past_key_values=cache)


def test_a_traced_step_moves_nothing_to_the_host(graphs, tiny, small, random_prompts, padded):
    model = tiny()
    with PolicyCache(small("rkv"), model, graph=True) as cache:
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=graphs)
        decode(cache, model, padded(random_prompts(20)), 3, step)
    (graph,) = graphs.made
    called = {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")}
    assert not called & {"item", "tolist", "cpu", "numpy", "nonzero", "_local_scalar_dense"}
    assert {"softmax", "index_copy_"} & called or any("scaled_dot_product" in each for each in called)


def test_beams_samples_crops_and_forks(tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(20, 9))
    results = []
    for graph in (False, True):
        with PolicyCache(policy, model, graph=graph) as cache:
            found = [generated(cache, model, inputs, 14, num_beams=2)[0]]
        with PolicyCache(policy, model, graph=graph) as cache:
            found.append(decode(cache, model, {"input_ids": inputs["input_ids"][:1]}, 9))
            twin = cache.fork()
            cache.crop(-2)
            with torch.no_grad():
                for each in (cache, twin):
                    for token in range(3, 30):
                        logits = model(torch.tensor([[token]]), past_key_values=each).logits
                    found.append((logits.argmax(-1).tolist(), each.kept(0, 1), each.kept(2, 0)))
            cache.batch_repeat_interleave(3)
            with torch.no_grad():
                for token in range(3, 20):
                    logits = model(torch.full((3, 1), token), past_key_values=cache).logits
            found.append((logits.argmax(-1).tolist(), cache.kept(0, 1, 2)))
            twin.close()
        results.append(found)
    assert results[0] == results[1]


def test_candidates_are_verified_as_without(tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(20))
    with PolicyCache(policy, model) as cache:
        expected = generated(cache, model, inputs, 25, prompt_lookup_num_tokens=3, eos_token_id=999)
    with PolicyCache(policy, model, graph=True) as cache:
        assert generated(cache, model, inputs, 25, prompt_lookup_num_tokens=3, eos_token_id=999) == expected


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(40,), (40, 13)])
def test_two_thousand_tokens_take_two_compilations_at_most(lengths, graphs, tiny, small, random_prompts, padded):
    policy, model, inputs = small("rkv"), tiny(), padded(random_prompts(*lengths))
    with PolicyCache(policy, model) as cache:
        expected = generated(cache, model, inputs, 2000)
    with PolicyCache(policy, model, graph=True) as cache:
        assert generated(cache, model, inputs, 2000, **compiling(graphs)) == expected
        assert cache.engine.rows[0].compactions > 200
    assert len(graphs.made) <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it compiles
def test_inductor_decodes_the_same(tiny, small, random_prompts, padded):
    policy, model = small("rkv"), tiny()
    for lengths in ((20,), (20, 7)):
        inputs = padded(random_prompts(*lengths))
        with PolicyCache(policy, model) as cache:
            expected = generated(cache, model, inputs, 60)
        config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
        config._compile_all_devices = True
        with PolicyCache(policy, model, graph=True) as cache:
            assert generated(cache, model, inputs, 60, compile_config=config) == expected


def test_the_name_of_a_policy_will_do(tiny):
    with PolicyCache(kvpolicy.load("rkv", budget=32), tiny(), graph=True) as cache:
        assert cache.engine.stores.slots == 32 + 128
