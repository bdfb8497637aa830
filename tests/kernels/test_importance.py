from __future__ import annotations

import math
import random

import pytest
import torch

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy_kernels import launching, similarity, window

NAN = float("nan")


def case(device, dtype, dim, group, queries, n, *, holes=True, late=False):
    """Queries and keys with what a cache really holds: NaN in free slots, an arena behind, strides, padding."""
    batch, heads = 2, 2
    arena = torch.full((2, batch, heads, n + 5, dim), NAN, dtype=dtype)
    keys = arena[1, :, :, :n]
    common = torch.randn(batch, heads, 1, dim)
    keys.copy_(common + torch.randn(batch, heads, n, dim))
    valid = torch.rand(batch, heads, n) > 0.15 if holes else torch.ones(batch, 1, n).bool().expand(-1, heads, -1)
    keys[~valid] = NAN
    step = torch.randint(1, 4, (batch, heads, n), dtype=torch.int32)
    positions = step.cumsum(-1, dtype=torch.int32)
    last = 0 if late else int(positions.max())
    at = (last + torch.stack([torch.randperm(queries) for _ in range(batch)])).to(torch.int32)
    at[0] -= 9  # one row's window overlaps with its slots
    asked = torch.rand(batch, queries) > 0.2
    asked[0, 0] = True
    asked[1] = asked[1] & (random.random() > 0.1)
    # Logits of up to about 5: an fp32 logit of 16 is itself only known to 1e-6, and so is its exponential.
    states = 0.6 * torch.randn(batch, heads, queries, group, dim) + 0.2 * common.unsqueeze(2)
    states[~asked[:, None, :, None].expand(-1, heads, -1, group)] = NAN
    queries_ = states.to(dtype).transpose(2, 3)
    tensors = (queries_, at, asked, arena, positions, valid)
    queries_, at, asked, arena, positions, valid = (t.to(device) for t in tensors)
    return queries_, at, asked, arena[1, :, :, :n], positions, valid


def smoothed(row, smooth, kind):
    result = []
    for i in range(len(row)):
        window = row[max(0, i - smooth // 2) : i + (smooth - 1) // 2 + 1]
        of = {"max": max(window), "mean": sum(window) / len(window), "mean_zero_padded": sum(window) / smooth}
        result.append(of[kind])
    return result


def reference(queries, at, asked, keys, positions, valid, scale, group="max", group_stage="logits",
              softmax_over="candidates", smooth=7, smooth_kind="max", smooth_stage="mean", softcap=None,
              attention_sinks=None):  # fmt: skip
    """The same in float64 and plain loops over rows, heads and queries."""
    out = torch.zeros(valid.shape, dtype=torch.float64)
    for b in range(valid.shape[0]):
        chosen = [q for q in range(asked.shape[1]) if asked[b, q]]
        oldest = min((int(at[b, q]) for q in chosen), default=2**31)
        for h in range(valid.shape[1]):
            held = [s for s in range(valid.shape[2]) if valid[b, h, s]]
            candidates = [s for s in held if positions[b, h, s] < oldest]
            if not chosen or not candidates:
                continue
            sinks = torch.full((queries.shape[2],), -math.inf, dtype=torch.float64)
            if attention_sinks is not None:
                sinks = attention_sinks[h].double()
            total = [0.0] * len(candidates)
            for q in chosen:
                seen = candidates
                if softmax_over == "row":
                    seen = [s for s in held if positions[b, h, s] <= at[b, q]]
                logits = (keys[b, h, seen].double() @ queries[b, h, :, q].double().T) * scale  # [seen, G]
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                one = logits, sinks[None]
                if group_stage == "logits":
                    one = [x.amax(1, keepdim=True) if group == "max" else x.mean(1, keepdim=True) for x in one]
                each = torch.softmax(torch.cat(list(one)), 0)[:-1]
                weights = each.amax(1) if group == "max" else each.mean(1)
                row = [float(weights[seen.index(s)]) for s in candidates]
                row = smoothed(row, smooth, smooth_kind) if smooth_stage == "query" else row
                total = [x + y / len(chosen) for x, y in zip(total, row, strict=True)]
            row = smoothed(total, smooth, smooth_kind) if smooth_stage == "mean" else total
            for s, score in zip(candidates, row, strict=True):
                out[b, h, s] = score
            for s in set(held) - set(candidates):
                out[b, h, s] = max(row)
    return out


def check(inputs, **options):
    scale = inputs[3].shape[-1] ** -0.5
    got = window.window_importance(*inputs, scale=scale, **options).cpu().double()
    on_host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = reference(*(t.cpu() for t in inputs), scale, **on_host)
    assert torch.isfinite(got).all()
    error = ((got - want).abs().amax(-1) / want.amax(-1).clamp(min=1e-30)).max()
    assert error < 1e-6, f"relative error {error:.2e}"


RKV = {}
SNAPKV = {"group": "mean", "group_stage": "weights", "softmax_over": "row"}
OTHERS = [
    {"group": group, "group_stage": stage, "softmax_over": over, "smooth": smooth}
    for group, stage, over, smooth in (
        ("mean", "logits", "candidates", 1), ("max", "logits", "row", 6), ("max", "weights", "candidates", 5),
        ("max", "weights", "row", 2), ("mean", "weights", "candidates", 40),
    )
]  # fmt: skip


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("options", [RKV, SNAPKV, *OTHERS], ids=lambda o: "-".join(map(str, o.values())) or "rkv")
def test_options(options, device, grid_order):
    check(case(device, torch.float16, 64, 3, 5, random.randint(60, 140)), **options)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("smooth", "kind", "stage"),
    [
        (6, "mean", "mean"),
        (7, "mean_zero_padded", "mean"),
        (1, "mean", "query"),
        (6, "max", "query"),
        (5, "mean", "query"),
    ],
)
def test_ways_of_smoothing(smooth, kind, stage, device, grid_order):
    inputs = case(device, torch.float16, 16, 2, 3, random.randint(65, 100))
    check(inputs, **random.choice([RKV, SNAPKV]), smooth=smooth, smooth_kind=kind, smooth_stage=stage)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("options", [RKV, SNAPKV, OTHERS[0]], ids=["rkv", "snapkv", "mean"])
def test_soft_cap_and_attention_sinks(options, softcap, sinks, device):
    """A sink is a logit of its own, of each query head; 2 bends every logit, 50 hardly any."""
    inputs = case(device, torch.bfloat16, 16, 3, 4, random.randint(30, 66))
    given = torch.randn(2, 3, device=device) + torch.tensor([[0.0, 4.0, -90.0]], device=device) if sinks else None
    check(inputs, **options, softcap=softcap, attention_sinks=given)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [*((d, n) for d in (torch.bfloat16, torch.float16, torch.float32) for n in (64, 128)), (torch.bfloat16, 16),
     (torch.float16, 32), (torch.bfloat16, 96), (torch.float16, 192), (torch.bfloat16, 256)],
)  # fmt: skip
def test_dtypes_and_head_dims(dtype, dim, device):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("fp32 caches are refused on a GPU")
    for options in (RKV, SNAPKV):
        check(case(device, dtype, dim, 2, 8, 70), **options)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("group", range(1, 9))
def test_group_sizes(group, device):
    check(case(device, torch.bfloat16, 64, group, random.choice([1, 7, 17]), 65), **random.choice([RKV, SNAPKV]))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 129, 200])
def test_sizes(n, device):
    for holes in (True, False):
        check(case(device, torch.float16, 16, 2, 3, n, holes=holes), **random.choice([RKV, SNAPKV]))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("options", [RKV, SNAPKV], ids=["rkv", "snapkv"])
def test_more_tiles_than_are_folded_at_a_time(options, device):
    inputs = [t[:1] for t in case(device, torch.float16, 16, 2, 3, 64 * 16 + 40)]
    inputs[3][:, :, -40:] *= 2  # the largest logits come last
    check(inputs, **options)


@pytest.mark.usefixtures("seed")
def test_no_candidates_no_queries_no_slots(device):
    inputs = case(device, torch.float16, 64, 2, 8, 40, late=True)
    for options in (RKV, SNAPKV):
        got = window.window_importance(*inputs, scale=0.1, **options)
        assert (got == 0).all(), "shorter than the window: nothing is a candidate"
        nobody = torch.zeros_like(inputs[2])
        got = window.window_importance(*inputs[:2], nobody, *inputs[3:], scale=0.1, **options)
        assert (got == 0).all()
    queries, at, asked, keys, positions, valid = inputs
    none = window.window_importance(queries, at, asked, keys[:, :, :0], positions[..., :0], valid[..., :0], scale=1.0)
    assert none.shape == (2, 2, 0)
    none = window.window_importance(queries[:, :, :, :0], at[:, :0], asked[:, :0], keys, positions, valid, scale=1.0)
    assert none.shape == valid.shape
    assert (none == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_key_cannot_hide(bad, device):
    inputs = case(device, torch.float16, 64, 2, 8, 80, holes=False)
    inputs[3][1, 1, 3] = bad
    for options in (RKV, SNAPKV):
        got = window.window_importance(*inputs, scale=0.1, **options)
        if inputs[2][1].any():
            assert not got[1, 1].isfinite().all(), "the policy refuses scores that are not finite"
        assert got[0].isfinite().all()
        assert got[1, 0].isfinite().all()


@pytest.mark.usefixtures("seed")
def test_a_batch_cut_to_bound_the_workspace_is_the_same(device, monkeypatch):
    inputs = case(device, torch.float16, 64, 2, 8, 70)
    whole = window.window_importance(*inputs, scale=0.1)
    monkeypatch.setattr(launching, "WORKSPACE_BYTES", 1)
    assert torch.equal(window.window_importance(*inputs, scale=0.1), whole)


@pytest.mark.usefixtures("seed")
def test_redundancy_reuses_the_one_read_of_the_keys(device, monkeypatch):
    names = []
    real = launching.launch

    def spy(name, *args, **kwargs):
        names.append(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(window, "launch", spy)
    monkeypatch.setattr(similarity, "launch", spy)
    queries, at, asked, keys, positions, valid = case(device, torch.float16, 64, 2, 8, 70)
    importance = window.window_importance(queries, at, asked, keys, positions, valid, scale=0.1)
    redundancy = similarity.redundancy(keys, valid)
    assert names.count("scan.scan_keys") == 2
    names.clear()
    with ops.using_backend("triton", shared=True):
        together = window.window_importance(queries, at, asked, keys, positions, valid, scale=0.1)
        other = similarity.redundancy(keys, valid & (positions > 3))  # another mask: read again
        window.window_importance(queries, at, asked, keys, positions, valid, scale=0.1)
        same = similarity.redundancy(keys, valid)
    assert names.count("scan.scan_keys") == 3
    assert torch.equal(together, importance)
    assert torch.equal(same, redundancy)
    assert torch.equal(other, similarity.redundancy(keys, valid & (positions > 3)))


@pytest.mark.usefixtures("seed")
def test_what_is_not_served_is_refused(device):
    queries, at, asked, keys, positions, valid = case(device, torch.float16, 64, 2, 8, 20)
    rest = (at, asked, keys, positions, valid)
    with ops.using_backend("triton"):
        many = torch.zeros(2, 2, 2, 33, 64, device=device, dtype=torch.float16), at[:, :1].expand(-1, 33)
        with pytest.raises(UnsupportedError, match=r"33 observed queries \(at most 32\)"):
            ops.window_importance(*many, many[1] > 0, keys, positions, valid, scale=1.0)
        with pytest.raises(UnsupportedError, match=r"float32 queries with torch\.float16 keys"):
            ops.window_importance(queries.float(), *rest, scale=1.0)
        across = keys.transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.raises(UnsupportedError, match=r"head dim must be contiguous"):
            ops.window_importance(queries, at, asked, across, positions, valid, scale=1.0)
    with ops.using_backend("auto" if device.type == "cuda" else "torch"):
        many = torch.zeros(2, 2, 2, 33, 64, device=device, dtype=torch.float16), at[:, :1].expand(-1, 33)
        assert ops.window_importance(*many, many[1] > 0, keys, positions, valid, scale=1.0).shape == valid.shape


@pytest.mark.usefixtures("seed")
def test_arguments_that_do_not_fit_are_refused(device):
    queries, at, asked, keys, positions, valid = case(device, torch.float16, 64, 2, 8, 20)
    wrong = [
        ((queries[:, :1], at, asked, keys, positions, valid), "queries has shape"),
        ((queries, at.long(), asked, keys, positions, valid), r"query_positions is torch\.int64"),
        ((queries, at, asked[:1], keys, positions, valid), "query_valid has shape"),
        ((queries, at, asked, keys, positions[..., :-1], valid), "positions has shape"),
        ((queries, at, asked, keys, positions, valid.int()), r"valid is torch\.int32"),
        ((queries, at, asked, keys, positions, valid.to("meta")), "valid is on meta"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            window.window_importance(*arguments, scale=1.0)


def test_the_reference_is_a_softmax():
    """Two keys, one query: weights 1 / (1 + e^-1) and the rest, by hand."""
    keys = torch.zeros(1, 1, 2, 16)
    keys[0, 0, 1, 0] = 1.0
    queries = torch.zeros(1, 1, 1, 1, 16)
    queries[..., 0] = 1.0
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    at, asked = torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.bool)
    want = reference(queries, at, asked, keys, torch.tensor([[[0, 1]]]), valid, 1.0, smooth=1)
    assert want[0, 0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
