"""`redundancy` against golden vectors and a literal n x n implementation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy import ops

G2 = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
G2B = torch.tensor([[1.0, 0.0, 0.0], [0.28, 0.96, 0.0], [0.28, 0.0, 0.96]])


def alone(keys):
    """[N, D] -> keys and a mask of everything, one row, one head."""
    return keys[None, None], torch.ones(1, 1, len(keys), dtype=torch.bool)


def literal_mean(keys, threshold, beta, spare, index_zero):
    """Mean similarity of [n, D] keys, in float64, entry by entry of the full matrix; and how near a cosine comes."""
    keys = keys.double()
    n = len(keys)
    norm = keys / (keys.norm(dim=-1, keepdim=True) + 1e-12)
    full = norm @ norm.T
    off = ~torch.eye(n, dtype=torch.bool)
    near = (full[off] - threshold).abs().min().item() if n > 1 else 1.0
    full.fill_diagonal_(0)
    cleared = full.clone()
    above = (full > threshold).tolist()
    for i in range(n):
        similar = [j for j in range(n) if j != i and above[i][j]]
        picked = similar[-beta:] if beta else []
        if index_zero and beta and not similar:
            picked = [0]
        for j in picked:
            cleared[i, j] = 0
    return cleared.mean(dim=0 if spare == "newest" else 1), near


def literal(keys, mask, **options):
    """The same for [B, H, N, D] with a mask; masked slots get 0. None when a cosine is at the threshold."""
    means = torch.zeros(mask.shape, dtype=torch.float64)
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for b, h in itertools.product(*map(range, mask.shape[:2])):
        at = mask[b, h].nonzero().flatten()
        if len(at) == 0:
            continue
        mean, near = literal_mean(keys[b, h, at], **options)
        if near < 1e-6:
            return None
        means[b, h, at] = mean
        weights[b, h, at] = mean.softmax(-1)
    return means, weights


def correlated(generator, batch, heads, n, dim, share):
    """Keys like real ones: a common direction, slow drift along the sequence, some exact repeats."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    keys = share * draw(batch, heads, 1, dim) + draw(batch, heads, n, dim)
    keys += 0.3 * draw(batch, heads, n, dim).cumsum(2) / max(n, 1) ** 0.5
    if n > 3:
        keys[:, :, n // 2] = keys[:, :, 1]
    return keys


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0, "spare": "newest"}, [0.35, 0.59, 0.59, 0.35]),
        ({"beta": 0, "spare": "own"}, [0.35, 0.59, 0.59, 0.35]),
        ({"beta": 1, "spare": "own"}, [0.20, 0.44, 0.39, 0.15]),
        ({"beta": 2, "spare": "own"}, [0.0, 0.20, 0.15, 0.0]),
        ({"beta": 1, "spare": "newest"}, [0.35, 0.59, 0.24, 0.0]),
        ({"beta": 1, "spare": "newest", "index_zero": True}, [0.35, 0.59, 0.24, 0.0]),
    ],
)
def test_golden_g2_mean(options, expected):
    mean = ops.mean_similarity(*alone(G2), threshold=0.5, **options)
    torch.testing.assert_close(mean[0, 0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0}, [0.220143, 0.279857, 0.279857, 0.220143]),
        ({"beta": 1, "spare": "own"}, [0.225646, 0.286852, 0.272862, 0.214641]),
        ({"beta": 2, "spare": "own"}, [0.228142, 0.278653, 0.265063, 0.228142]),
        ({"beta": 1, "spare": "newest"}, [0.258280, 0.328338, 0.231376, 0.182007]),
    ],
)
def test_golden_g2_softmax(options, expected):
    score = ops.redundancy(*alone(G2), threshold=0.5, **options)
    torch.testing.assert_close(score[0, 0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "means", "weights"),
    [
        ({"spare": "own"}, [0.186667, 0.119467, 0.119467], [0.348430, 0.325785, 0.325785]),
        ({"spare": "newest", "index_zero": True}, [0.0, 0.119467, 0.119467], [0.307334, 0.346333, 0.346333]),
    ],
)
def test_golden_g2b_index_zero(options, means, weights):
    torch.testing.assert_close(
        ops.mean_similarity(*alone(G2B), **options)[0, 0], torch.tensor(means), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(ops.redundancy(*alone(G2B), **options)[0, 0], torch.tensor(weights), atol=1e-6, rtol=0)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 65, 131, 200])
def test_equals_literal(n, threshold):
    generator = torch.Generator().manual_seed(n * 100 + int(threshold * 10))
    for draw, (beta, spare, index_zero) in enumerate(itertools.product(range(4), ("newest", "own"), (False, True))):
        options = {"threshold": threshold, "beta": beta, "spare": spare, "index_zero": index_zero}
        while True:
            keys = correlated(generator, 2, 2, n, 8, share=(draw % 3) * 0.7)
            mask = torch.rand(2, 2, n, generator=generator) < (1.0 if draw % 2 else 0.8)
            expected = literal(keys, mask, **options)
            if expected is not None:
                break
        poisoned = torch.where(mask[..., None], keys, float("nan"))
        mean = ops.mean_similarity(poisoned, mask, **options)
        torch.testing.assert_close(mean.double(), expected[0], atol=2e-6, rtol=0)
        weights = ops.redundancy(poisoned, mask, **options)
        torch.testing.assert_close(weights.double(), expected[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("beta", "threshold"), [(1, 0.8), (3, 0.5), (1, 0.99)])
def test_many_blocks_and_uneven_heads(beta, threshold):
    """Heads that resolve at different depths, and one that never does."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(1, 4, 330, dtype=torch.bool)
    options = {"beta": beta, "threshold": threshold, "spare": "newest", "index_zero": True}
    expected = None
    while expected is None:
        keys = correlated(generator, 1, 4, 330, 16, share=0.0)
        keys[0, 1] += 4.0
        keys[0, 2, :200] += 3.0
        keys[0, 3] = torch.randn(330, 16, generator=generator).cumsum(0)
        expected = literal(keys, mask, **options)
    torch.testing.assert_close(ops.mean_similarity(keys, mask, **options).double(), expected[0], atol=2e-6, rtol=0)


def test_newest_of_duplicates_is_least_redundant():
    keys = torch.randn(1, 1, 1, 8).expand(1, 1, 5, 8)
    score = ops.redundancy(keys, torch.ones(1, 1, 5, dtype=torch.bool))[0, 0]
    assert score.argmin() == 4
    assert (score[:3] == score[0]).all()


def test_half_precision_is_upcast_first():
    generator = torch.Generator().manual_seed(1)
    keys, mask = correlated(generator, 1, 2, 90, 16, share=1.0), torch.ones(1, 2, 90, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16):
        half = keys.to(dtype)
        torch.testing.assert_close(ops.redundancy(half, mask), ops.redundancy(half.float(), mask), atol=0, rtol=0)
    large = torch.full((1, 1, 4, 64), 60000.0, dtype=torch.float16)
    assert ops.redundancy(large, torch.ones(1, 1, 4, dtype=torch.bool)).isfinite().all()


def test_zero_keys_are_similar_to_nothing():
    keys = torch.zeros(1, 1, 5, 4)
    keys[0, 0, 1, 0] = 1.0
    mask = torch.ones(1, 1, 5, dtype=torch.bool)
    for index_zero in (False, True):
        assert (ops.mean_similarity(keys, mask, index_zero=index_zero) == 0).all()
        torch.testing.assert_close(ops.redundancy(keys, mask, index_zero=index_zero), torch.full((1, 1, 5), 0.2))


def test_no_slots_no_participants_one_participant():
    assert ops.redundancy(torch.empty(2, 3, 0, 4), torch.empty(2, 3, 0, dtype=torch.bool)).shape == (2, 3, 0)
    keys, mask = torch.full((1, 1, 6, 4), float("nan")), torch.zeros(1, 1, 6, dtype=torch.bool)
    assert (ops.redundancy(keys, mask, index_zero=True) == 0).all()
    keys[0, 0, 2], mask[0, 0, 2] = 1.0, True
    assert ops.redundancy(keys, mask, index_zero=True)[0, 0].tolist() == [0, 0, 1, 0, 0, 0]


def test_participants_restrict_the_valid():
    keys, mask = torch.randn(1, 2, 9, 4), torch.ones(1, 2, 9, dtype=torch.bool)
    participates = torch.arange(9).expand(1, 2, 9) < 6
    whole = ops.redundancy(keys, mask, participates=participates)
    torch.testing.assert_close(whole[..., :6], ops.redundancy(keys[:, :, :6], mask[..., :6]), atol=1e-7, rtol=0)
    assert (whole[..., 6:] == 0).all()


def test_rows_heads_and_padding_do_not_meet():
    generator = torch.Generator().manual_seed(3)
    keys = correlated(generator, 3, 2, 150, 8, share=0.7)
    mask = torch.ones(3, 2, 150, dtype=torch.bool)
    mask[1, :, :20] = False
    mask[2, :, 100:] = False
    together = ops.redundancy(keys, mask, beta=2)
    torch.testing.assert_close(together[:1], ops.redundancy(keys[:1], mask[:1], beta=2), atol=1e-7, rtol=0)
    alone_1 = ops.redundancy(keys[1:2, :, 20:], mask[1:2, :, 20:], beta=2)
    torch.testing.assert_close(together[1:2, :, 20:], alone_1, atol=1e-7, rtol=0)
    alone_2 = ops.redundancy(keys[2:, :, :100], mask[2:, :, :100], beta=2)
    torch.testing.assert_close(together[2:, :, :100], alone_2, atol=1e-7, rtol=0)
    swapped = ops.redundancy(keys.flip(1), mask.flip(1), beta=2)
    torch.testing.assert_close(swapped.flip(1), together, atol=1e-7, rtol=0)


def test_permutation_equivariance_without_exemptions():
    keys, mask = torch.randn(1, 1, 40, 8), torch.ones(1, 1, 40, dtype=torch.bool)
    order = torch.randperm(40)
    once = ops.redundancy(keys, mask, beta=0)[..., order]
    torch.testing.assert_close(ops.redundancy(keys[:, :, order], mask, beta=0), once, atol=1e-7, rtol=0)


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any result held."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("share", "threshold"), [(1.0, 0.5), (0.0, 0.95)], ids=["early exit", "no exit at all"])
def test_never_keys_times_keys(share, threshold):
    n, dim = 4224, 16
    generator = torch.Generator().manual_seed(0)
    keys = share * torch.randn(1, 1, 1, dim, generator=generator) + torch.randn(1, 1, n, dim, generator=generator)
    with _Largest() as largest:
        ops.redundancy(keys, torch.ones(1, 1, n, dtype=torch.bool), threshold=threshold)
    assert n <= largest.elements <= n * 64
