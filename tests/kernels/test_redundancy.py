from __future__ import annotations

import random

import pytest
import torch

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy_kernels import launching, similarity

NAN = float("nan")


def case(device, dtype, dim, n, *, share=0.8, holes=True, threshold=0.5):
    """Keys of an arena, redrawn until no cosine lies at the threshold, where rounding decides."""
    while True:
        arena = torch.full((2, 2, n + 7, dim), NAN, dtype=dtype)
        keys = arena[:, :, :n]
        keys.copy_(share * torch.randn(2, 2, 1, dim) + torch.randn(2, 2, n, dim))
        if n > 4:
            keys[0, 0, 1] = 0.0
            if threshold < 1:
                keys[0, 1, 2] = keys[0, 1, 4]
        valid = torch.rand(2, 2, n) > 0.1 if holes else torch.ones(2, 2, n, dtype=torch.bool)
        keys[~valid] = NAN
        unit = torch.nn.functional.normalize(torch.where(valid.unsqueeze(-1), keys, 0).double(), dim=-1)
        real = unit.norm(dim=-1) > 0
        pairs = (real.unsqueeze(-1) & real.unsqueeze(-2)).triu(1)
        cosine = unit @ unit.transpose(-1, -2)
        if (cosine[pairs] - threshold).abs().gt(1e-6).all():
            return arena.to(device)[:, :, :n], valid.to(device)


def reference(keys, valid, *, threshold=0.5, beta=1, spare="newest", index_zero=False, softmax=True):
    """In float64, a cosine at a time where it matters."""
    out = torch.zeros(valid.shape, dtype=torch.float64)
    for b in range(valid.shape[0]):
        for h in range(valid.shape[1]):
            held = [s for s in range(valid.shape[2]) if valid[b, h, s]]
            if not held:
                continue
            k = keys[b, h, held].double()
            unit = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-15)
            cosine = unit @ unit.T
            columns = cosine.sum(0) - cosine.diagonal()
            table = cosine.tolist()
            for i in range(len(held)):
                left = beta
                for j in range(len(held) - 1, -1, -1):
                    if left and j != i and table[i][j] > threshold:
                        columns[j if spare == "newest" else i] -= table[i][j]
                        left -= 1
                if index_zero and beta and left == beta and i != 0:
                    columns[0 if spare == "newest" else i] -= table[i][0]
            mean = columns / len(held)
            out[b, h, held] = torch.softmax(mean, 0) if softmax else mean
    return out


def check(keys, valid, **options):
    got = similarity.redundancy(keys, valid, **options).cpu().double()
    if got.numel() == 0:
        return
    want = reference(keys.cpu(), valid.cpu(), **options)
    error = ((got - want).abs().amax(-1) / want.amax(-1).clamp(min=1e-30)).max()
    assert error < 1e-6, f"relative error {error:.2e}"
    mean = similarity.mean_similarity(keys, valid, **options).cpu().double()
    torch.testing.assert_close(mean, reference(keys.cpu(), valid.cpu(), **options, softmax=False), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
@pytest.mark.parametrize("spare", ["newest", "own"])
@pytest.mark.parametrize("index_zero", [False, True])
def test_options(beta, spare, index_zero, device):
    check(*case(device, torch.float16, 64, random.randint(65, 140)), beta=beta, spare=spare, index_zero=index_zero)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_dtypes_and_head_dims(dtype, dim, device, grid_order):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("fp32 caches are refused on a GPU")
    check(*case(device, dtype, dim, 90))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 32), (torch.bfloat16, 96), (torch.float16, 192), (torch.bfloat16, 256)]
)
def test_other_head_dims_and_those_that_are_read_in_parts(dtype, dim, device):
    check(*case(device, dtype, dim, 70), beta=2, index_zero=True)
    check(*case(device, dtype, dim, 70), spare="own", index_zero=True)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("threshold", "share"), [(0.0, 0.0), (0.3, 1.5), (0.5, 0.0), (0.9, 0.8), (1.0, 0.8)])
def test_thresholds_from_early_exit_to_a_full_scan(threshold, share, device):
    keys, valid = case(device, torch.float16, 64, 135, share=share, threshold=threshold)
    check(keys, valid, threshold=threshold, index_zero=True)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 128, 193])
def test_sizes(n, device):
    for holes in (True, False):
        keys, valid = case(device, torch.float16, 16, n, holes=holes)
        assert similarity.redundancy(keys, valid).shape == (2, 2, n)
        check(keys, valid, index_zero=random.random() < 0.5)


@pytest.mark.usefixtures("seed")
def test_more_tiles_than_are_folded_at_a_time(device):
    keys, valid = case(device, torch.float16, 16, 64 * 32 + 20, threshold=3.0)
    check(keys[:1, :1], valid[:1, :1], beta=0)


@pytest.mark.usefixtures("seed")
def test_left_out_keys_and_empty_heads(device):
    keys, valid = case(device, torch.float16, 64, 80, holes=False)
    some = torch.rand(2, 2, 80, device=device) > 0.5
    got = similarity.redundancy(keys, valid, participates=some)
    keys[~some] = NAN
    assert torch.equal(got, similarity.redundancy(keys, some))
    some[1, 0] = False
    got = similarity.redundancy(keys, some, index_zero=True)
    assert (got[1, 0] == 0).all()
    assert got.isfinite().all()


@pytest.mark.usefixtures("seed")
def test_sums_do_not_depend_on_the_order_of_programs(device, grid_order, request):
    torch.manual_seed(11)
    keys, valid = case(device, torch.float16, 64, 150)
    got = similarity.redundancy(keys, valid, beta=3)
    assert torch.equal(got, similarity.redundancy(keys, valid, beta=3))
    store = request.config.stash.setdefault(ORDERS, [])
    store.append(got)
    assert all(torch.equal(got, other) for other in store), "forward and backward differ"


ORDERS = pytest.StashKey()


@pytest.mark.usefixtures("seed")
def test_rows_and_layers_in_one_launch_equal_each_alone(device, monkeypatch):
    keys, valid = case(device, torch.float16, 64, 70)
    arena = torch.stack([keys, keys.flip(1), keys * 2])  # [L, B, H, N, D]
    masks = torch.stack([valid, valid.flip(1), valid])
    together = similarity.redundancy(arena.flatten(0, 1), masks.flatten(0, 1)).unflatten(0, (3, 2))
    for layer in range(3):
        for row in range(2):
            alone = similarity.redundancy(arena[layer, row : row + 1], masks[layer, row : row + 1])
            assert torch.equal(alone[0], together[layer, row])
    monkeypatch.setattr(launching, "WORKSPACE_BYTES", 1)
    cut = similarity.redundancy(arena.flatten(0, 1), masks.flatten(0, 1))
    assert torch.equal(cut.unflatten(0, (3, 2)), together)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("index_zero", [False, True])
def test_a_bad_key_cannot_hide(bad, index_zero, device):
    keys, valid = case(device, torch.float16, 64, 80, holes=False)
    keys[1, 0, 7] = bad
    got = similarity.redundancy(keys, valid, index_zero=index_zero)
    assert not got[1, 0].isfinite().any(), "the policy refuses scores that are not finite"
    assert got[0].isfinite().all()
    assert got[1, 1].isfinite().all()


@pytest.mark.usefixtures("seed")
def test_refusals(device):
    keys, valid = case(device, torch.float16, 64, 20)
    with ops.using_backend("triton"), pytest.raises(UnsupportedError, match=r"beta: 5 \(at most 4\)"):
        ops.redundancy(keys, valid, beta=5)
    odd = torch.randn(1, 1, 8, 48, device=device, dtype=torch.float16)
    with ops.using_backend("triton"), pytest.raises(UnsupportedError, match="head dim is 48"):
        ops.redundancy(odd, valid[:1, :1, :8])
    with pytest.raises(ValueError, match="valid has shape"):
        similarity.redundancy(keys, valid[:, :1])
