"""Scorers that remember attention, against the papers' formulas in plain loops and double precision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.errors import UnsupportedError

B, H, G, N, D = 2, 2, 3, 14, 8


def make(name, **params):
    return kvpolicy.catalog().get("importance", name)(**params)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softmax(logits):
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return [x / sum(exps) for x in exps]


def rows_of_weights(view, queries, positions, valid):
    """Softmax weights by (row, head, group, query), as lists over slots; None for padding."""
    table: dict[tuple[int, int, int, int], list[float] | None] = {}
    for b in range(queries.shape[0]):
        for h in range(queries.shape[1]):
            for g in range(queries.shape[2]):
                for q in range(queries.shape[3]):
                    if not valid[b, q]:
                        table[b, h, g, q] = None
                        continue
                    seen = [n for n in range(view.shape[2]) if view.valid[b, h, n]]
                    seen = [n for n in seen if view.positions[b, h, n] <= positions[b, q]]
                    query = queries[b, h, g, q].double()
                    logits = [float(query @ view.keys[b, h, n].double()) * view.scale for n in seen]
                    row = [0.0] * view.shape[2]
                    for n, weight in zip(seen, softmax(logits), strict=True):
                        row[n] = weight
                    table[b, h, g, q] = row
    return table


def blocks(view, queries, positions, valid, sizes):
    """Yield what the engine feeds: the view with the block's positions, and the weights."""
    from kvpolicy import ops

    start = 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        weights = ops.attention_weights(
            queries[:, :, :, part], positions[:, part], valid[:, part], view.keys, view.positions, view.valid,
            scale=view.scale,
        )  # fmt: skip
        yield replace(view, query_positions=positions[:, part], query_valid=valid[:, part]), weights


def observed(scorer, view, queries, positions, valid, sizes):
    """Return the slot state after all queries."""
    state = {s.name: torch.full(view.shape, s.fill, dtype=s.dtype) for s in scorer.slot_state()}
    for seen, weights in blocks(view, queries, positions, valid, sizes):
        made = scorer.observe_attention(replace(seen, state=state), weights)
        assert {name: t.dtype for name, t in made.items()} == {s.name: s.dtype for s in scorer.slot_state()}
        state = {**state, **made}
    return state


@pytest.fixture
def prompt(make_view):
    """A prompt of 14 tokens in row 0 and 9 in row 1, padded on the left in the pass and free behind in the cache."""
    generator = torch.Generator().manual_seed(8)
    queries = 3 * torch.randn(B, H, G, N, D, generator=generator)
    lengths = torch.tensor([14, 9])
    positions = torch.arange(N, dtype=torch.int32) - (N - lengths)[:, None].int()
    valid = positions >= 0
    slots = torch.arange(N)
    view = make_view(
        shape=(B, H, N, D),
        valid=(slots < lengths[:, None])[:, None].expand(B, H, N),
        seen=lengths,
        prompt_length=lengths,
    )
    view = replace(view, keys=view.keys.masked_fill(~view.valid[..., None], float("nan")))
    return view, queries, positions, valid


SIZES = [(14,), (5, 9), (1,) * 14, (8, 1, 5)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9975, 1.0])
def test_decayed_attention_decays_per_query(prompt, sizes, decay):
    view, queries, positions, valid = prompt
    scorer = make("decayed_attention", decay=decay)
    state = observed(scorer, view, queries, positions, valid, sizes)
    got = scorer.score(replace(view, state=state))
    table = rows_of_weights(view, queries, positions, valid)
    for b in range(B):
        for h in range(H):
            expected = [0.0] * N
            for q in range(N):
                if not valid[b, q]:
                    continue
                rows = [table[b, h, g, q] for g in range(G)]
                expected = [decay * x + sum(row[n] for row in rows) for n, x in enumerate(expected)]
            for n in range(N):
                if view.valid[b, h, n]:
                    assert got[b, h, n].item() == pytest.approx(expected[n], rel=1e-4, abs=1e-6)


def test_decay_of_one_is_h2o(prompt):
    view, queries, positions, valid = prompt
    one, h2o = make("decayed_attention", decay=1.0), make("accumulated_attention")
    a = observed(one, view, queries, positions, valid, (5, 9))
    b = observed(h2o, view, queries, positions, valid, (5, 9))
    both = one.score(replace(view, state=a)), h2o.score(replace(view, state=b))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", [0.5, 0.1, 1.0])
def test_last_used_stamps_the_upper_share(prompt, sizes, share):
    view, queries, positions, valid = prompt
    scorer = make("last_used", share=share)
    state = observed(scorer, view, queries, positions, valid, sizes)
    got = scorer.score(replace(view, state=state))
    table = rows_of_weights(view, queries, positions, valid)
    late = 0
    for b in range(B):
        for h in range(H):
            stamps = [int(p) for p in view.positions[b, h]]
            for q in range(N):
                if not valid[b, q]:
                    continue
                step = int(positions[b, q])
                best = [max(table[b, h, g, q][n] for g in range(G)) for n in range(step + 1)]
                count = math.ceil(share * (step + 1) - 1e-9)
                for n in sorted(range(step + 1), key=lambda n: -best[n])[:count]:
                    stamps[n] = max(stamps[n], step)
            for n in range(N):
                if view.valid[b, h, n]:
                    assert got[b, h, n].item() == stamps[n]
                    late += stamps[n] > n
    assert late > 5


def test_last_used_stamps_equal_weights_together(make_view):
    """All keys alike: no order of slots may decide which half is stamped."""
    view = make_view(keys=torch.ones(1, 1, 6, 4), seen=torch.tensor([6]))
    at, real = torch.tensor([[5]], dtype=torch.int32), torch.ones(1, 1, dtype=torch.bool)
    scorer = make("last_used")
    state = observed(scorer, view, torch.ones(1, 1, 1, 1, 4), at, real, (1,))
    assert scorer.score(replace(view, state=state))[0, 0].tolist() == [5.0] * 6


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_recurrence(prompt, sizes, threshold):
    view, queries, positions, valid = prompt
    scorer = make("recurrence", threshold=threshold)
    state = observed(scorer, view, queries, positions, valid, sizes)
    got = scorer.score(replace(view, state=state, seen=view.seen + 4))
    table = rows_of_weights(view, queries, positions, valid)
    intervals = set()
    for b in range(B):
        now = int(view.seen[b]) + 4 - 1
        for h in range(H):
            for n in range(N):
                if not view.valid[b, h, n]:
                    continue
                last, longest = n, 0
                for q in range(N):
                    if valid[b, q] and max(table[b, h, g, q][n] for g in range(G)) > threshold:
                        step = int(positions[b, q])
                        longest = max(longest, step - last)
                        last = step
                intervals.add(longest)
                if longest:
                    expected = 2 * sigmoid(-(now - last) / longest) + 2 * sigmoid(-1 / longest)
                else:
                    expected = 2 * sigmoid(0.0 if now == last else -math.inf)
                assert got[b, h, n].item() == pytest.approx(expected, rel=1e-5, abs=1e-7), (b, h, n)
    assert len(intervals) > 3


def test_recurrence_of_an_entry_that_was_active_just_now(make_view):
    view = make_view(shape=(1, 1, 3, 4), seen=torch.tensor([3]))
    state = {
        "recurrence_last": torch.tensor([[[2, 1, -1]]], dtype=torch.int32),
        "recurrence_interval": torch.tensor([[[2, 0, 0]]], dtype=torch.int32),
    }
    got = make("recurrence").score(replace(view, state=state))[0, 0].tolist()
    assert got == pytest.approx([1 + 2 * sigmoid(-0.5), 0.0, 1.0])


@pytest.mark.parametrize("name", ["decayed_attention", "last_used", "recurrence"])
def test_observers_say_what_is_missing(make_view, name):
    scorer = make(name)
    view = make_view(state={s.name: torch.zeros(2, 2, 20, dtype=s.dtype) for s in scorer.slot_state()})
    with pytest.raises(UnsupportedError, match=name):
        scorer.observe_attention(view, torch.zeros(2, 2, 1, 1, 20))


def test_golden_vector_g5_h2o(make_view):
    """One head, two entries: the prompt's three rows, one eviction, one decode row."""

    def feed(view, state, row):
        weights = torch.tensor(row)[None, None, None, None]
        return scorer.observe_attention(replace(view, state=state), weights)

    scorer = make("accumulated_attention")
    view = make_view(shape=(1, 1, 3, 4))
    state = {"accumulated_attention": torch.zeros(1, 1, 3)}
    for row in ([1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.5, 0.3]):
        state = feed(view, state, row)
    assert scorer.score(replace(view, state=state))[0, 0].tolist() == pytest.approx([1.7, 1.0, 0.3])
    policy = kvpolicy.load("h2o").replace({"protect.recent": 1, "budget.tokens": 2}).build()
    (kept,) = policy.select([replace(view, state=state)], [2])
    assert kept.indices[0, 0].tolist() == [0, 2]
    left = torch.cat([state["accumulated_attention"][..., kept.indices[0, 0]], torch.zeros(1, 1, 1)], -1)
    positions = torch.tensor([[[0, 2, 3]]], dtype=torch.int32)
    view = replace(view, positions=positions, seen=torch.tensor([4]))
    state = feed(view, {"accumulated_attention": left}, [0.1, 0.6, 0.3])
    assert state["accumulated_attention"][0, 0].tolist() == pytest.approx([1.8, 0.9, 0.3])
    (kept,) = policy.select([replace(view, state=state)], [2])
    assert positions[0, 0, kept.indices[0, 0]].tolist() == [0, 3]


def test_golden_vector_g5_sums_are_not_means(make_view):
    scorer = make("accumulated_attention")
    view, state = make_view(shape=(1, 1, 3, 4)), {"accumulated_attention": torch.zeros(1, 1, 3)}
    for row in ([1.0, 0.0, 0.0], [0.3, 0.7, 0.0], [0.2, 0.7, 0.1]):
        state = scorer.observe_attention(replace(view, state=state), torch.tensor(row)[None, None, None, None])
    scores = scorer.score(replace(view, state=state))[0, 0]
    assert scores.tolist() == pytest.approx([1.5, 1.4, 0.1])  # means over the queries that see it: .5, .7, .1
    assert scores.argmax() == 0


@pytest.mark.parametrize("ring", [False, True])
def test_tova_is_the_last_row(make_view, ring):
    generator = torch.Generator().manual_seed(3)
    queries = 2 * torch.randn(2, 2, 3, 5, 8, generator=generator)
    at = torch.tensor([[15, 16, 17, 18, 19], [2**31 - 1, 9, 10, 11, 12]], dtype=torch.int32)
    real = torch.tensor([[True] * 5, [False, True, True, True, True]])
    if ring:
        order = [3, 4, 0, 1, 2]
        queries, at, real = queries[:, :, :, order], at[:, order], real[:, order]
    valid = torch.arange(20) < torch.tensor([20, 13])[:, None, None].expand(2, 2, 1)
    view = make_view(queries=queries, query_positions=at, query_valid=real, valid=valid)
    got = make("tova").score(replace(view, keys=view.keys.masked_fill(~valid[..., None], float("nan"))))
    for b, last in enumerate([19, 12]):
        column = at[b].tolist().index(last)
        for h in range(2):
            expected = [0.0] * 20
            for g in range(3):
                query = queries[b, h, g, column].double()
                row = softmax([float(query @ view.keys[b, h, n].double()) * view.scale for n in range(last + 1)])
                for n, weight in enumerate(row):
                    expected[n] += weight / 3
            assert got[b, h].tolist() == pytest.approx(expected, abs=1e-6)


def test_tova_keeps_one_set_per_layer(make_view):
    generator = torch.Generator().manual_seed(4)
    view = make_view(queries=3 * torch.randn(2, 2, 3, 1, 8, generator=generator))
    policy = kvpolicy.load("tova").replace("budget.tokens", 6).build()
    (kept,) = policy.select([view], [6, 6])
    assert torch.equal(kept.indices[:, 0], kept.indices[:, 1])
    for b in range(2):
        total = torch.zeros(20, dtype=torch.float64)
        for h in range(2):
            for g in range(3):
                query = view.queries[b, h, g, 0].double()
                total += torch.tensor(softmax([float(query @ k.double()) * view.scale for k in view.keys[b, h]]))
        best = total[:19].topk(5).indices.tolist()
        assert kept.indices[b, 0].tolist() == sorted([*best, 19])


# -- G-KV -------------------------------------------------------------------------------------------------------------


def window_share(view, observe):
    """The authors' score of the moment: largest weight of the group, mean over the window, by the largest of a head."""
    last = [int(view.seen[b]) for b in range(view.shape[0])]
    table = rows_of_weights(view, view.queries, view.query_positions, view.query_valid)
    result: dict[tuple[int, int], dict[int, float]] = {}
    for b in range(view.shape[0]):
        columns = [q for q in range(view.queries.shape[3]) if view.query_positions[b, q] >= last[b] - observe]
        for h in range(view.shape[1]):
            old = [n for n in range(view.shape[2]) if view.valid[b, h, n]]
            old = [n for n in old if view.positions[b, h, n] < last[b] - observe]
            mean = {
                n: sum(max(table[b, h, g, q][n] for g in range(view.queries.shape[2])) for q in columns) / len(columns)
                for n in old
            }
            result[b, h] = {n: mean[n] / max(mean.values()) for n in old}
    return result


@pytest.mark.parametrize("combine", ["max", "mean", "sum"])
@pytest.mark.parametrize("smooth", [1, 3])
def test_attention_memory_over_two_compactions(make_view, combine, smooth):
    """State, gather and second score, followed step by step as the authors' code does."""
    observe, decay, budget = 3, 0.8, 10
    base = make("window_attention", observe=observe, group="max", group_stage="weights", softmax_over="row", smooth=1)
    scorer = make("attention_memory", base=base, decay=decay, combine=combine, window=observe, smooth=smooth)
    generator = torch.Generator().manual_seed(11)
    view = make_view(shape=(2, 2, 20, 8), queries=3 * torch.randn(2, 2, 3, observe, 8, generator=generator))
    (slot,) = scorer.slot_state()
    view = replace(view, state={slot.name: torch.full(view.shape, slot.fill)})
    memory: dict[tuple[int, int], dict[int, float]] = {}  # by (row, head): position -> F
    for _ in range(3):
        now = window_share(view, observe)
        got, new_state = scorer.score(view), scorer.remember(view)[slot.name]
        kept = torch.zeros(2, 2, budget, dtype=torch.int64)
        for b in range(2):
            for h in range(2):
                positions = [int(p) for p in view.positions[b, h]]
                before = memory.get((b, h), {})
                final = {}
                for n, share in now[b, h].items():
                    old = before.get(positions[n])
                    if old is None:
                        final[n] = share
                    elif combine == "max":
                        final[n] = max(decay * old, share)
                    else:
                        final[n] = decay * old + (share if combine == "sum" else (1 - decay) * share)
                pooled = {n: max(final.get(m, 0.0) for m in range(n - smooth // 2, n + smooth // 2 + 1)) for n in final}
                for n, expected in pooled.items():
                    assert got[b, h, n].item() == pytest.approx(expected, rel=1e-4), (b, h, n)
                best = sorted(final, key=lambda n: (-got[b, h, n].item(), n))[: budget - observe]
                chosen = sorted([*best, *range(20 - observe, 20)])
                kept[b, h] = torch.tensor(chosen)
                memory[b, h] = {positions[n]: final[n] for n in best}
        view = next_view(view, kept, new_state, slot, generator, observe)
    assert any(len(m) == budget - observe for m in memory.values())


def next_view(view, kept, new_state, slot, generator, observe):
    """Gather what stays, append new tokens up to 20 slots, and take new queries."""
    fresh = 20 - kept.shape[-1]
    seen = int(view.seen[0]) + fresh
    wide = kept[..., None].expand(-1, -1, -1, 8)
    state = new_state.gather(2, kept)
    added = torch.arange(seen - fresh, seen, dtype=torch.int32).expand(2, 2, fresh)
    at = torch.arange(seen - observe, seen, dtype=torch.int32).expand(2, observe)
    return replace(
        view,
        keys=torch.cat([view.keys.gather(2, wide), torch.randn(2, 2, fresh, 8, generator=generator)], 2),
        positions=torch.cat([view.positions.gather(2, kept), added], 2),
        state={slot.name: torch.cat([state, torch.full((2, 2, fresh), slot.fill)], 2)},
        queries=3 * torch.randn(2, 2, 3, observe, 8, generator=generator),
        query_positions=at,
        seen=torch.tensor([seen, seen]),
    )


def test_attention_memory_is_stored_unsmoothed_and_without_the_window(make_view):
    generator = torch.Generator().manual_seed(2)
    queries = 3 * torch.randn(2, 2, 3, 4, 8, generator=generator)
    view = make_view(queries=queries, state={"attention_memory": torch.full((2, 2, 20), -1.0)})
    base = make("window_attention", observe=4, group_stage="weights", softmax_over="row", smooth=1)
    plain = make("attention_memory", base=base, window=4)
    smooth = make("attention_memory", base=base, window=4, smooth=5)
    assert not torch.equal(plain.score(view), smooth.score(view))
    stored = smooth.remember(view)["attention_memory"]
    torch.testing.assert_close(stored[..., :16], plain.score(view)[..., :16])
    assert (stored[..., 16:] == -1).all()


def test_attention_memory_remembers_what_the_moment_has_forgotten(make_view):
    """An entry that was the best once stays above those that are a little better now."""
    state = torch.full((1, 1, 20), 0.05)
    state[..., 7] = 1.0
    view = make_view(shape=(1, 1, 20, 8), queries=torch.zeros(1, 1, 1, 2, 8), state={"attention_memory": state})
    keys = view.keys.clone()
    base = make("window_attention", observe=2, group_stage="weights", softmax_over="row", smooth=1)
    scorer = make("attention_memory", base=base, decay=0.8, window=2)
    assert scorer.score(replace(view, keys=keys))[0, 0, 7].item() == pytest.approx(1.0)  # even attention: all are best
    queries = 9 * keys[:, :, 3:4].unsqueeze(2).expand(1, 1, 1, 2, 8)
    got = scorer.score(replace(view, queries=queries))[0, 0]
    assert got[3].item() == pytest.approx(1.0)
    assert got[7].item() == pytest.approx(0.8)


# -- CriticalKV -------------------------------------------------------------------------------------------------------
