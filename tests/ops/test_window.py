"""`window_importance` and `smooth_scores` against golden vectors and a literal implementation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvpolicy import ops

# Coordinates of the keys are logarithms, so that with unit logits every exponential is a small integer.
G1_KEYS = torch.tensor([[1, 1, 4, 1], [1, 3, 1, 1], [2, 1, 1, 1], [4, 1, 1, 2], [1, 1, 1, 1], [1, 1, 1, 3]]).log()
G1_QUERIES = 2 * torch.tensor([[[1, 0, 0, 0], [0, 0, 1, 0]], [[0, 1, 0, 0], [0, 0, 0, 1]]]).float()  # [G, Q, D]


def g1(window_keys, **options):
    keys = torch.cat([G1_KEYS, window_keys])[None, None]
    return ops.window_importance(
        G1_QUERIES[None, None],
        torch.tensor([[6, 7]], dtype=torch.int32),
        torch.ones(1, 2, dtype=torch.bool),
        keys,
        torch.arange(8, dtype=torch.int32).expand(1, 1, 8),
        torch.ones(1, 1, 8, dtype=torch.bool),
        scale=0.5,
        **options,
    )[0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"smooth": 1}, [5 / 24, 4 / 24, 3 / 24, 6 / 24, 2 / 24, 4 / 24]),
        ({"smooth": 3}, [5 / 24, 5 / 24, 6 / 24, 6 / 24, 6 / 24, 4 / 24]),
        ({"smooth": 2, "smooth_stage": "query"}, [5 / 24, 7 / 24, 4 / 24, 6 / 24, 6 / 24, 4 / 24]),
        (
            {"smooth": 1, "group": "mean", "group_stage": "weights"},
            [0.195139, 0.174306, 0.136806, 0.214583, 0.111806, 0.167361],
        ),
        (
            {"smooth": 1, "group": "max", "group_stage": "weights"},
            [0.284722, 0.243056, 0.155556, 0.311111, 0.118056, 0.229167],
        ),
        (
            {"smooth": 1, "group": "mean", "group_stage": "weights", "softmax_over": "row"},
            [0.164141, 0.151515, 0.118687, 0.186869, 0.095960, 0.141414],
        ),
    ],
)
def test_golden_g1(options, expected):
    scores = g1(torch.zeros(2, 4), **options)
    torch.testing.assert_close(scores[:6], torch.tensor(expected), atol=1e-6, rtol=0)
    assert (scores[6:] == scores[:6].max()).all(), "the window gets the largest candidate score"
    if options.get("softmax_over", "candidates") == "candidates":
        torch.testing.assert_close(g1(torch.randn(2, 4), **options)[:6], scores[:6], atol=1e-7, rtol=0)


def literal_smooth(scores, size, kind):
    result = []
    for i in range(len(scores)):
        inside = [scores[j] for j in range(i - size // 2, i + (size - 1) // 2 + 1) if 0 <= j < len(scores)]
        if kind == "max":
            result.append(max(inside))
        else:
            result.append(sum(inside) / (len(inside) if kind == "mean" else size))
    return result


def literal_importance(
    queries, query_positions, query_valid, keys, positions, valid, *, scale, softcap, attention_sinks,
    group, group_stage, softmax_over, smooth, smooth_kind, smooth_stage,
):  # fmt: skip
    """One loop per axis, Python floats."""
    B, H, G, Q, _ = queries.shape
    result = torch.zeros(valid.shape, dtype=torch.float64)
    reduce = max if group == "max" else (lambda xs: sum(xs) / len(xs))
    for b, h in itertools.product(range(B), range(H)):
        asked = [q for q in range(Q) if query_valid[b, q]]
        slots = [s for s in range(valid.shape[2]) if valid[b, h, s]]
        if not asked:
            continue
        oldest = min(int(query_positions[b, q]) for q in asked)
        candidates = [s for s in slots if positions[b, h, s] < oldest]
        if not candidates:
            continue
        rows = []
        for q in asked:
            seen = candidates
            if softmax_over == "row":
                seen = [s for s in slots if positions[b, h, s] <= query_positions[b, q]]
            logits = [
                [float(queries[b, h, g, q].double() @ keys[b, h, s].double()) * scale for s in seen] for g in range(G)
            ]
            if softcap is not None:
                logits = [[softcap * math.tanh(x / softcap) for x in row] for row in logits]
            sinks = [None] * G if attention_sinks is None else [float(attention_sinks[h, g]) for g in range(G)]
            if group_stage == "logits":
                logits = [[reduce([logits[g][i] for g in range(G)]) for i in range(len(seen))]]
                sinks = [None if sinks[0] is None else reduce(sinks)]
            weights = []
            for row, sink in zip(logits, sinks, strict=True):
                total = sum(math.exp(x) for x in row) + (0 if sink is None else math.exp(sink))
                weights.append([math.exp(x) / total for x in row])
            mixed = [reduce([w[i] for w in weights]) for i in range(len(seen))]
            row = [mixed[seen.index(s)] for s in candidates]
            rows.append(literal_smooth(row, smooth, smooth_kind) if smooth_stage == "query" else row)
        scores = [sum(row[i] for row in rows) / len(rows) for i in range(len(candidates))]
        if smooth_stage == "mean":
            scores = literal_smooth(scores, smooth, smooth_kind)
        for s in slots:
            result[b, h, s] = scores[candidates.index(s)] if s in candidates else max(scores)
    return result


def draw(generator, group=2, n=23, q=4, dim=8):
    """Two rows, two heads; holes in the slots, queries out of order, some invalid, NaN wherever nothing may look."""
    B, H = 2, 2
    queries = torch.randn(B, H, group, q, dim, generator=generator)
    keys = torch.randn(B, H, n, dim, generator=generator)
    valid = torch.rand(B, H, n, generator=generator) < 0.85
    positions = (torch.arange(n) * 2).expand(B, H, n) + torch.randint(0, 2, (B, H, n), generator=generator)
    newest = 2 * n - torch.randint(0, 3, (B, 1), generator=generator)
    query_positions = newest - torch.stack([torch.randperm(q, generator=generator) for _ in range(B)])
    query_valid = torch.rand(B, q, generator=generator) < 0.8
    queries = torch.where(query_valid[:, None, None, :, None], queries, float("nan"))
    keys = torch.where(valid[..., None], keys, float("nan"))
    return queries, query_positions.int(), query_valid, keys, positions.int(), valid


CASES = [
    dict(zip(("group", "group_stage", "softmax_over", "smooth_stage"), case, strict=True))
    for case in itertools.product(("max", "mean"), ("logits", "weights"), ("candidates", "row"), ("mean", "query"))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_equals_literal(case):
    generator = torch.Generator().manual_seed(7)
    kinds = itertools.cycle(("max", "mean", "mean_zero_padded"))
    for size, softcap, sinks, group in itertools.product((1, 2, 5, 6), (None, 2.0), (False, True), (1, 3)):
        inputs = draw(generator, group)
        options = {
            **case,
            "scale": 0.4,
            "softcap": softcap,
            "attention_sinks": torch.randn(2, group, generator=generator) if sinks else None,
            "smooth": size,
            "smooth_kind": next(kinds),
        }
        scores = ops.window_importance(*inputs, **options)
        torch.testing.assert_close(scores.double(), literal_importance(*inputs, **options), atol=1e-6, rtol=0)


def test_a_hole_is_no_neighbour():
    """Invalid slots between candidates change nothing but their own place."""
    generator = torch.Generator().manual_seed(2)
    queries, query_positions, query_valid, keys, positions, _ = draw(generator, n=12)
    keys, query_valid = keys.nan_to_num(0.3), torch.ones_like(query_valid)
    queries = queries.nan_to_num(0.1)
    keep = torch.tensor([0, 1, 4, 5, 6, 9, 10, 11])
    valid = torch.zeros(2, 2, 12, dtype=torch.bool)
    valid[..., keep] = True
    holes = ops.window_importance(queries, query_positions, query_valid, keys, positions, valid, scale=1.0, smooth=5)
    packed = ops.window_importance(
        queries,
        query_positions,
        query_valid,
        keys[:, :, keep],
        positions[..., keep],
        valid[..., keep],
        scale=1.0,
        smooth=5,
    )
    torch.testing.assert_close(holes[..., keep], packed, atol=1e-7, rtol=0)
    assert (holes[~valid] == 0).all()


def test_nothing_to_look_at():
    generator = torch.Generator().manual_seed(1)
    queries, query_positions, query_valid, keys, positions, valid = draw(generator)
    none = torch.zeros_like(query_valid)
    assert (ops.window_importance(queries, query_positions, none, keys, positions, valid, scale=1.0) == 0).all()
    assert (
        ops.window_importance(queries, query_positions, query_valid, keys, positions, valid & False, scale=1.0) == 0
    ).all()
    early = torch.zeros_like(query_positions)
    assert (ops.window_importance(queries, early, query_valid, keys, positions, valid, scale=1.0) == 0).all()
    no_slots = ops.window_importance(
        queries, query_positions, query_valid, keys[:, :, :0], positions[..., :0], valid[..., :0], scale=1.0
    )
    assert no_slots.shape == (2, 2, 0)
    no_queries = ops.window_importance(
        queries[:, :, :, :0], query_positions[:, :0], query_valid[:, :0], keys, positions, valid, scale=1.0
    )
    assert (no_queries == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_first(dtype):
    queries, query_positions, query_valid, keys, positions, valid = draw(torch.Generator().manual_seed(4))
    half = ops.window_importance(
        queries.to(dtype), query_positions, query_valid, keys.to(dtype), positions, valid, scale=1.0
    )
    full = ops.window_importance(
        queries.to(dtype).float(), query_positions, query_valid, keys.to(dtype).float(), positions, valid, scale=1.0
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0, rtol=0)


def test_order_of_queries_does_not_matter():
    queries, query_positions, query_valid, keys, positions, valid = draw(torch.Generator().manual_seed(9))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = queries[:, :, :, order], query_positions[:, order], query_valid[:, order]
    expected = ops.window_importance(queries, query_positions, query_valid, keys, positions, valid, scale=1.0)
    torch.testing.assert_close(
        ops.window_importance(*shuffled, keys, positions, valid, scale=1.0), expected, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("kind", ["max", "mean", "mean_zero_padded"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 40])
def test_smoothing_equals_literal(kind, size):
    scores = torch.rand(3, 11)
    candidates = torch.tensor([[True] * 11, [False, True, True, False] * 2 + [True] * 3, [False] * 11])
    pooled = ops.smooth_scores(scores, candidates, size, kind)
    for row in range(3):
        at = candidates[row].nonzero().flatten()
        expected = literal_smooth(scores[row, at].tolist(), size, kind)
        torch.testing.assert_close(pooled[row, at], torch.tensor(expected), atol=1e-6, rtol=0)
    assert (pooled[~candidates] == 0).all()
