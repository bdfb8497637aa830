"""R-KV's three files: golden vectors, and the kept set of literal implementations that share nothing with the ops."""

from __future__ import annotations

import pytest
import torch

import kvpolicy

G1_KEYS = torch.tensor([[1, 1, 4, 1], [1, 3, 1, 1], [2, 1, 1, 1], [4, 1, 1, 2], [1, 1, 1, 1], [1, 1, 1, 3]]).log()
G1_QUERIES = 2 * torch.tensor([[[1, 0, 0, 0], [0, 0, 1, 0]], [[0, 1, 0, 0], [0, 0, 0, 1]]]).float()
G2_KEYS = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
G2B_KEYS = torch.tensor([[1.0, 0.0, 0.0], [0.28, 0.96, 0.0], [0.28, 0.0, 0.96]])
G3_KEYS = torch.cat([G2_KEYS, torch.tensor([[0.6, -0.8]])])
G3_QUERY = torch.tensor([[[[[2 * 2**0.5, 0.0]]]]])


def policy(name, changes=()):
    return kvpolicy.load(name).replace(dict(changes)).build()


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("rkv", {"importance.smooth": 1}, [5, 4, 3, 6, 2, 4]),
        ("rkv-code", {"importance.smooth": 1}, [5, 4, 3, 6, 2, 4]),
        ("rkv-code", {"importance.smooth": 3}, [5, 5, 6, 6, 6, 4]),
        ("rkv-paper", {"importance.smooth": 2}, [5, 7, 4, 6, 6, 4]),
    ],
)
def test_golden_g1(make_view, name, changes, expected):
    keys = torch.cat([G1_KEYS, torch.randn(2, 4)])[None, None]
    scorer = policy(name, {"importance.observe": 2, **changes}).importance
    scores = scorer.score(make_view(keys, queries=G1_QUERIES[None, None]))
    close(scores[0, 0, :6] * 24, [float(x) for x in expected])


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("snapkv", {"importance.group": "mean"}, [0.164141, 0.151515, 0.118687, 0.186869, 0.095960, 0.141414]),
        (
            "snapkv",
            {"importance.softmax_over": "candidates"},
            [0.195139, 0.174306, 0.136806, 0.214583, 0.111806, 0.167361],
        ),
        (
            "snapkv",
            {"importance.softmax_over": "candidates", "importance.group": "max"},
            [0.284722, 0.243056, 0.155556, 0.311111, 0.118056, 0.229167],
        ),
    ],
)
def test_golden_g1_snapkv(make_view, name, changes, expected):
    keys = torch.cat([G1_KEYS, torch.zeros(2, 4)])[None, None]
    scorer = policy(name, {"importance.observe": 2, "importance.smooth": 1, **changes}).importance
    close(scorer.score(make_view(keys, queries=G1_QUERIES[None, None]))[0, 0, :6], expected)


@pytest.mark.parametrize(
    ("name", "beta", "expected"),
    [
        ("rkv-code", 0, [0.220143, 0.279857, 0.279857, 0.220143]),
        ("rkv-paper", 0, [0.220143, 0.279857, 0.279857, 0.220143]),
        ("rkv-paper", 1, [0.225646, 0.286852, 0.272862, 0.214641]),
        ("rkv-paper", 2, [0.228142, 0.278653, 0.265063, 0.228142]),
        ("rkv-code", 1, [0.258280, 0.328338, 0.231376, 0.182007]),
        ("rkv", 1, [0.258280, 0.328338, 0.231376, 0.182007]),
    ],
)
def test_golden_g2(make_view, name, beta, expected):
    scorer = policy(name, {"redundancy.beta": beta, "redundancy.window": 0}).redundancy
    close(scorer.score(make_view(G2_KEYS[None, None]))[0, 0], expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rkv-paper", [0.348430, 0.325785, 0.325785]), ("rkv-code", [0.307334, 0.346333, 0.346333])],
)
def test_golden_g2b(make_view, name, expected):
    scorer = policy(name, {"redundancy.window": 0}).redundancy
    keys = torch.cat([G2B_KEYS, torch.zeros(3, 1)], -1)[None, None]
    close(scorer.score(make_view(keys))[0, 0], expected)


def g3(name, weight):
    return policy(
        name,
        {
            "budget.tokens": 3,
            "protect.recent": 1,
            "importance.observe": 1,
            "importance.smooth": 1,
            "redundancy.window": 1 if name == "rkv-paper" else 0,
            "mixer.weight": weight,
        },
    )


def test_golden_g3_importance(make_view):
    view = make_view(G3_KEYS[None, None], queries=G3_QUERY)
    for name in ("rkv-code", "rkv-paper"):
        close(g3(name, 0.1).importance.score(view)[0, 0, :4], [0.443462, 0.297262, 0.199260, 0.060016])
    pooled = policy("rkv-code", {"importance.observe": 1, "importance.smooth": 3}).importance
    close(pooled.score(view)[0, 0, :4], [0.443462, 0.443462, 0.297262, 0.199260])


@pytest.mark.parametrize(
    ("name", "weight", "redundancy", "joint"),
    [
        (
            "rkv-paper", 0.1,
            [0.225646, 0.286852, 0.272862, 0.214641], [-0.158735, -0.228440, -0.225650, -0.187175],
        ),
        (
            "rkv-code", 0.1,
            [0.225177, 0.272840, 0.219837, 0.145022], [-0.158313, -0.215830, -0.177927, -0.124518],
        ),
        (
            "rkv-code", 0.07,
            [0.225177, 0.272840, 0.219837, 0.145022], [-0.178372, -0.232933, -0.190500, -0.130669],
        ),
    ],
)  # fmt: skip
def test_golden_g3_joint_score(make_view, name, weight, redundancy, joint):
    made, view = g3(name, weight), make_view(G3_KEYS[None, None], queries=G3_QUERY)
    close(made.redundancy.score(view)[0, 0, :4], redundancy)
    close(made.retention(view)[0, 0, :4], joint)
    assert made.select([view], [3])[0].indices.tolist() == [[[0, 3, 4]]]


@pytest.mark.parametrize(
    ("weight", "paper", "code"),
    [
        (0.0, [0, 3], [2, 3]),
        (0.01, [0, 3], [2, 3]),
        (0.1, [0, 3], [0, 3]),
        (0.5, [0, 1], [0, 1]),
        (1.0, [0, 1], [0, 1]),
    ],
)
def test_golden_g3_sweep(make_view, weight, paper, code):
    view = make_view(G3_KEYS[None, None], queries=G3_QUERY)
    for name, kept in (("rkv-paper", paper), ("rkv-code", code)):
        assert g3(name, weight).select([view], [3])[0].indices.tolist() == [[[*kept, 4]]], name


# Literal implementations: one KV head, float64, the full similarity matrix.


def similarity(keys):
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    matrix = unit @ unit.T
    off = matrix[~torch.eye(len(keys), dtype=torch.bool)]
    return matrix.fill_diagonal_(0), (off - 0.5).abs().min().item()


def newest_similar(matrix):
    """Index of the newest similar key of each row, -1 if it has none."""
    return [max((j for j, above in enumerate(row) if above), default=-1) for row in (matrix > 0.5).tolist()]


def code_importance(queries, keys, window, size):
    """Steps 1 to 3 of the released code: [G, a, D] and [N, D] -> [N - a]."""
    logits = (queries @ keys.T / keys.shape[-1] ** 0.5).amax(0)[:, :-window]
    return pool(logits.softmax(-1).mean(0), size // 2, size // 2)


def pool(row, left, right):
    return torch.stack([row[max(i - left, 0) : i + right + 1].max() for i in range(len(row))])


def code_redundancy(keys, *, index_zero):
    """Step 4: rows pick, columns are averaged, over all keys."""
    matrix, near = similarity(keys)
    for i, j in enumerate(newest_similar(matrix)):
        if j >= 0 or index_zero:
            matrix[i, max(j, 0)] = 0
    return matrix.mean(0).softmax(-1), near


def literal_rkv_code(queries, keys, budget, sinks=0, *, index_zero=True):
    score = 0.1 * code_importance(queries, keys, 8, 7)
    redundancy, near = code_redundancy(keys, index_zero=index_zero)
    score = score - 0.9 * redundancy[:-8]
    score[:sinks] = float("inf")
    return best(score, budget - 8, len(keys), 8), near


def literal_rkv(queries, keys, budget):
    return literal_rkv_code(queries, keys, budget, sinks=4, index_zero=False)


def literal_rkv_paper(queries, keys, budget):
    """Equations 1 to 7 with W = 3, T = 0.5, beta = 1, alpha = 8."""
    candidates = keys[:-8]
    logits = (queries @ candidates.T / keys.shape[-1] ** 0.5).amax(0)
    importance = torch.stack([pool(row, 3, 2) for row in logits.softmax(-1)]).mean(0)
    matrix, near = similarity(candidates)
    for i, j in enumerate(newest_similar(matrix)):
        if j >= 0:
            matrix[j, i] = 0
    redundancy = matrix.mean(0).softmax(-1)
    return best(0.1 * importance - 0.9 * redundancy, budget - 8, len(keys), 8), near


def best(score, count, total, window):
    """The kept set, and how clear the cut is; equal scores go to the older key."""
    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    gap = float(score[order[count - 1]] - score[order[count]])
    return sorted(order[:count]) + list(range(total - window, total)), gap


LITERAL = {"rkv": literal_rkv, "rkv-code": literal_rkv_code, "rkv-paper": literal_rkv_paper}


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("draw", range(24))
def test_kept_set_equals_literal(make_view, name, draw):
    generator = torch.Generator().manual_seed(draw)
    group, dim, n = 1 + draw % 4, (8, 16)[draw % 2], (60, 97, 131, 150)[draw // 4 % 4]
    budget = 20 + draw * (n - 30) // 24
    B, H = 2, 2
    for _ in range(50):
        share = (0.0, 0.5, 1.0)[draw % 3]
        keys = share * torch.randn(B, H, 1, dim, generator=generator) + torch.randn(B, H, n, dim, generator=generator)
        keys[:, :, n // 2] = keys[:, :, 5]
        queries = 2 * torch.randn(B, H, group, 8, dim, generator=generator)
        expected, sure = {}, True
        for b in range(B):
            for h in range(H):
                (kept, gap), near = LITERAL[name](queries[b, h].double(), keys[b, h].double(), budget)
                # Equal scores are no doubt: identical neighbours of a maximum never share their redundancy.
                sure = sure and near > 1e-6 and gap > 1e-8
                expected[b, h] = kept
        if sure:
            break
    assert sure, "no clear draw found"
    kept = policy(name, {"budget.tokens": budget}).select([make_view(keys, queries=queries)], [budget] * B)[0]
    assert kept.lengths.tolist() == [[budget] * H] * B
    for (b, h), slots in expected.items():
        assert kept.indices[b, h].tolist() == slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LITERAL)
def test_half_precision_input_keeps_nearly_the_same(make_view, name, dtype):
    generator = torch.Generator().manual_seed(1)
    keys = 0.8 * torch.randn(1, 4, 1, 32, generator=generator) + torch.randn(1, 4, 200, 32, generator=generator)
    queries = torch.randn(1, 4, 2, 8, 32, generator=generator)
    made = policy(name, {"budget.tokens": 100})
    full = made.select([make_view(keys, queries=queries)], [100])[0].indices
    half = made.select([make_view(keys.to(dtype), queries=queries.to(dtype))], [100])[0].indices
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(full[0], half[0], strict=True))
    assert shared >= 0.95 * 400


def test_published_defaults():
    """Weight 0.1 in all files; 0.07 of the released class is one override away."""
    for name in LITERAL:
        assert policy(name).mixer.weight == 0.1
        assert policy(name).trigger.buffer() == 128
    assert policy("rkv-code", {"mixer.weight": 0.07}).mixer.weight == 0.07
