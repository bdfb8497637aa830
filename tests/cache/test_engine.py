"""The engine with invented keys, values and queries: no model, no transformers."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.contracts.components import Counters
from kvpolicy.errors import BudgetError
from kvsupport.engine_driver import CPU, DIM, GROUPS, POLICIES, Driver


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_a_row_does_not_depend_on_its_neighbours(fields):
    prompts = ["..........xxxxxxx", "xxxxxxxxxxxxxxxxx", "................x"]
    batch = Driver([1, 2, 3], **fields)
    batch.feed(*prompts)
    batch.steps(40)
    batch.engine.settle()
    batch.check_contents()
    for b, prompt in enumerate(prompts):
        alone = Driver([b + 1], **fields)
        alone.feed(prompt.strip("."))
        alone.steps(40)
        alone.engine.settle()
        assert alone.kept(0) == batch.kept(b)
        mine, row = alone.engine.rows[0], batch.engine.rows[b]
        assert mine == row
    assert all(row.compactions for row in batch.engine.rows)


def test_padding_in_any_place_is_not_stored():
    holes, alone = Driver([1, 2]), Driver([1])
    for mask in ("..x.", "xx.x", "x..."):
        holes.feed(mask, "xxxx")
    alone.feed("x")
    alone.feed("xxx")
    alone.feed("x")
    assert holes.kept(0) == alone.kept(0)
    assert [row.seen for row in holes.engine.rows] == [5, 12]
    holes.check_contents()


def test_a_row_without_a_new_token_waits():
    """A finished row that is masked is left as it is."""
    driver = Driver([1, 2])
    driver.feed("x" * 15, "x" * 15)
    for _ in range(12):
        driver.feed("x", ".")
    assert [row.resident for row in driver.engine.rows] == [19, 15]
    assert driver.engine.rows[1].compactions == 0
    assert driver.kept(1)[0][0] == list(range(15))


# -- room ------------------------------------------------------------------------------------------------------------


def test_a_bounded_policy_takes_what_its_text_needs_and_never_more_than_its_bound():
    driver = Driver([1], budget=300, trigger={"every": 20})
    driver.feed("x" * 40)
    store, used, sizes = driver.engine.stores[0], 40, []
    while len(sizes) < 350:
        driver.steps(1)
        used = max(used, driver.engine.rows[0].resident)
        sizes.append(store.capacity)
        assert sizes[-1] <= min(used + max(used // 2, 64) + 1, 320)
    assert sizes[-1] == driver.engine.policy.bound == 320
    assert len(set(sizes)) <= 5, "copies are few"
    driver.check_contents()


def test_a_small_bound_is_taken_at_once_and_never_more():
    driver = Driver([1, 2])
    driver.feed("x" * 5, "x" * 5)
    store = driver.engine.stores[0]
    assert store.capacity == driver.engine.policy.bound == 20
    keys = store.keys
    for _ in range(60):
        driver.steps(1)
        assert store.keys is keys
        assert max(row.resident for row in driver.engine.rows) <= 20
    assert driver.engine.rows[0].peak == 20


def test_a_long_prompt_gets_what_it_needs_and_gives_it_back():
    driver = Driver([1])
    driver.feed("x" * 100)
    assert 100 <= driver.engine.stores[0].capacity <= 102
    driver.steps(1)
    driver.check_contents()
    driver.steps(1)
    assert driver.engine.stores[0].capacity == 20
    driver.check_contents()


@pytest.mark.parametrize("fields", [{"budget": 1.0}, {"budget": 0.9}, {"phase": "prefill"}])
def test_an_unbounded_policy_grows_geometrically(fields):
    driver = Driver([1], **fields)
    driver.feed("xxx")
    sizes = set()
    for _ in range(390):
        driver.steps(1)
        sizes.add(driver.engine.stores[0].capacity)
    assert len(sizes) <= 6
    driver.check_contents()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 11])
def test_the_bound_holds_for_chunks_of_the_prompt(chunk):
    driver = Driver([1, 2], phase="both", prefill_chunk=chunk)
    for _ in range(60 // chunk):
        driver.feed("x" * chunk, "." * (chunk // 2) + "x" * (chunk - chunk // 2), kind="prompt")
        assert max(row.resident for row in driver.engine.rows) <= 16 + max(4, chunk) == driver.engine.policy.bound
    driver.steps(20)
    assert driver.engine.rows[0].peak <= 16 + max(4, chunk)
    assert driver.engine.stores[0].capacity <= driver.engine.policy.bound
    driver.check_contents()


def test_a_compaction_evicts_at_least_the_interval():
    driver = Driver([1])
    driver.feed("x" * 10)
    before = []
    for _ in range(80):
        row = driver.engine.rows[0]
        resident, count = row.resident, row.compactions
        driver.steps(1)
        if driver.engine.rows[0].compactions > count:
            before.append(resident)
            assert driver.engine.rows[0].resident == 17
    assert before == [20] * len(before)
    assert len(before) == (80 - 11) // 4 + 1


def test_layers_of_different_shapes_have_stores_of_their_own():
    driver = Driver([1], groups=((0, 3), (1,)), heads={0: 2, 1: 4, 3: 2})
    driver.feed("x" * 10)
    driver.steps(30)
    driver.check_contents()
    stores = driver.engine.stores
    assert stores[0] is stores[3] is not stores[1]
    assert driver.engine.layers == [0, 1, 3]
    assert [len(heads) for heads in driver.kept(0)] == [2, 4, 2]


def test_all_layers_share_one_set_across_stores():
    fields = {"selector": {"use": "top_k", "scope": "model"}}
    driver = Driver([1], groups=((0, 3), (1,)), heads={0: 2, 1: 4, 3: 2}, **fields)
    driver.feed("x" * 10)
    driver.steps(30)
    assert len({tuple(held) for layer in driver.kept(0) for held in layer}) == 1


def test_attention_returns_all_slots_in_use():
    driver = Driver([1, 2])
    driver.feed("..xxx", "xxxxx")
    keys, values = driver.feed("x", "x")[2]
    assert keys.shape == (2, 2, 6, DIM)
    assert torch.equal(keys[0, :, :4], driver.texts[0].keys[2][:, :4])
    assert torch.equal(values[1], driver.texts[1].values[2][:, :6])
    assert bool(torch.isfinite(keys).all()), "a tail is multiplied by 0 and must be finite"
    mask = driver.engine.forward.mask_on(CPU, explicit=False)
    assert mask[:, 0, 0].tolist() == [[True] * 4 + [False] * 2, [True] * 6]


# -- what a policy sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 70, 200])
def test_accumulated_attention_is_the_sum_over_all_queries(length):
    """Fed in blocks, early and late, it is what one dense attention gives."""
    driver = Driver([1, 2], importance="accumulated_attention", budget=300)
    driver.feed("x" * length, "." * 3 + "x" * (length - 3))
    driver.steps(9)
    driver.feed("xxxxx", "x.x.x")
    driver.engine.observe()
    for b, seen in enumerate(driver.at):
        for i in driver.engine.layers:
            store, text = driver.engine.stores[i], driver.texts[b]
            queries = text.queries[i][:, :seen].unflatten(0, (2, GROUPS)).double()
            logits = torch.einsum("hgqd,hnd->hgqn", queries, text.keys[i][:, :seen].double()) * DIM**-0.5
            causal = torch.ones(seen, seen, dtype=torch.bool).tril()
            wanted = logits.masked_fill(~causal, float("-inf")).softmax(-1).sum((1, 2))
            got = store.state["accumulated_attention"][store.index[i], b, :, :seen]
            assert torch.allclose(got.double(), wanted, atol=1e-4)


def test_state_moves_with_its_slots_and_starts_fresh():
    driver = Driver([1], importance="accumulated_attention")
    driver.feed("x" * 10)
    driver.steps(11)
    resident = driver.engine.rows[0].resident
    before = driver.engine.stores[0].state["accumulated_attention"][0, 0, 0, :resident].tolist()
    before = dict(zip(driver.kept(0)[0][0], before, strict=True))
    driver.engine.observe()
    driver.steps(1)
    state = driver.engine.stores[0].state["accumulated_attention"][0, 0, 0]
    resident = driver.engine.rows[0].resident
    assert all(
        value >= before.get(p, 0) for p, value in zip(driver.kept(0)[0][0], state[:resident].tolist(), strict=True)
    )
    assert float(state[resident - 1]) == 0.0  # has not been observed yet


def test_the_window_holds_the_last_valid_queries_of_each_row():
    driver = Driver([1, 2, 3], **POLICIES["rkv"], budget=100)
    driver.feed("....xxxxxx", ".........x", "xxxxxxxxxx")
    driver.feed("x.", ".x", "xx")
    driver.feed("x", "x", "x")
    view = driver.engine.view(2, slice(0, 3), driver.engine.log.window())
    for b, seen in enumerate(driver.at):
        good = view.query_valid[b]
        at = view.query_positions[b][good].long()
        assert sorted(at.tolist()) == list(range(max(seen - 4, 0), seen))
        wanted = driver.texts[b].queries[2][:, at].unflatten(0, (2, GROUPS))
        assert torch.equal(view.queries[b][:, :, good], wanted)


def test_the_view_tells_the_counters_of_its_rows():
    driver = Driver([1, 2])
    driver.feed(".." + "x" * 12, "x" * 14)
    driver.steps(10)
    view = driver.engine.view(2, slice(1, 2))
    assert (view.layer_idx, view.num_layers) == (2, 4)
    assert view.seen.tolist() == [24]
    assert view.prompt_length.tolist() == [14]
    assert view.compaction.tolist() == [1]
    assert view.shape == (1, 2, driver.engine.rows[1].resident)
    whole = driver.engine.view(0, slice(0, 2))
    assert whole.valid.sum(-1).tolist() == [[row.resident] * 2 for row in driver.engine.rows]


def test_re_rotated_keys_stand_at_contiguous_positions():
    driver = Driver([1, 2], post=["rerotate"], trigger="each_step")
    driver.feed("x" * 10, "...xxxxxxx")
    driver.steps(30)
    driver.engine.settle()
    rope = driver.engine.ropes[0]
    for b, row in enumerate(driver.engine.rows):
        store = driver.engine.stores[0]
        assert store.rope_positions[0, b, 0, : row.resident].tolist() == list(range(row.resident))
        at = store.positions[0, b, 0, : row.resident]
        angle = (torch.arange(row.resident) - at)[:, None] * rope.inv_freq
        first, second = driver.texts[b].keys[0][0, at.long()].chunk(2, -1)
        turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
        assert torch.allclose(store.keys[0, b, 0, : row.resident], turned, atol=1e-4)
        assert row.shift == row.seen - row.resident


# -- when ------------------------------------------------------------------------------------------------------------


def test_settling_is_what_the_next_step_does_and_happens_once():
    driver, other = Driver([1, 2]), Driver([1, 2])
    for each in (driver, other):
        each.feed("x" * 17, ".xxxxxxxxxxxxxxxx")
        each.steps(3)
    assert driver.engine.rows[0].resident == 20
    driver.engine.settle()
    assert driver.engine.rows[0].resident == 16
    kept = driver.kept(0)
    driver.engine.settle()
    assert driver.kept(0) == kept
    driver.steps(1)
    other.steps(1)
    assert driver.kept(0) == other.kept(0)
    assert driver.kept(1) == other.kept(1)


@pytest.mark.parametrize(
    ("phase", "after_prompt", "after_steps"), [("prefill", 17, 27), ("decode", 31, 18), ("both", 17, 19)]
)
def test_the_phase_says_when(phase, after_prompt, after_steps):
    driver = Driver([1], phase=phase)
    driver.feed("x" * 30)
    driver.steps(1)
    assert driver.engine.rows[0].resident == after_prompt
    driver.steps(10)
    assert driver.engine.rows[0].resident == after_steps


def test_several_tokens_at_once_are_what_the_runtime_says():
    driver = Driver([1])
    driver.feed("x" * 10)
    assert not driver.engine.decoding
    driver.steps(1)
    assert driver.engine.decoding
    driver.feed("xxx", kind="prompt")
    assert not driver.engine.decoding
    driver.feed("xxx", kind="verify")
    assert driver.engine.decoding
    driver.engine.crop(1)
    assert driver.engine.decoding
    assert driver.engine.rows[0].prompt == 10


def test_a_crop_back_to_the_prompt_goes_on_with_it():
    driver = Driver([1])
    driver.feed("x" * 10)
    driver.steps(3)
    driver.engine.crop(3)
    assert not driver.engine.decoding
    driver.feed("xx", kind="prompt")
    assert driver.engine.rows[0].prompt == 12


def test_one_token_of_a_prompt_is_a_prompt_when_the_runtime_says_so():
    driver = Driver([1])
    for _ in range(5):
        driver.feed("x", kind="prompt")
    assert driver.engine.rows[0].prompt == 5
    driver.feed("x")
    assert driver.engine.rows[0].prompt == 5


def test_the_trigger_is_asked_with_the_counters_of_the_row(monkeypatch):
    asked = []
    driver = Driver([1], protect={"prompt": True}, budget=0.5)
    trigger = type(driver.engine.policy.trigger)
    monkeypatch.setattr(trigger, "fires", lambda self, counters: asked.append(counters))
    driver.feed("x" * 10)
    driver.steps(15)
    assert asked[0] == Counters(resident=11, budget=10, incoming=1, seen=11, prompt=10)
    assert asked[-1] == Counters(resident=24, budget=12, incoming=1, seen=24, prompt=10)


def test_a_prompt_that_is_pinned_and_too_long_is_an_error_and_breaks_nothing():
    driver = Driver([1], protect={"prompt": True})
    driver.feed("x" * 30)
    driver.steps(1)
    kept = driver.kept(0)
    for _ in range(2):
        with pytest.raises(BudgetError, match="16 entries per head are fewer than the 30"):
            driver.steps(1)
    assert driver.kept(0) == kept
    assert driver.engine.rows[0].seen == 31
