"""Arguments that do not fit together are refused by name; odd but legal ones have a defined result."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import ops
from kvpolicy.types import KeepIndices

NAN, INF = float("nan"), float("inf")
BATCH, HEADS, GROUP, SLOTS, DIM, QUERIES = 2, 3, 2, 20, 16, 4


def legal(op):
    """Arguments of an operation, by name."""
    keys = torch.randn(BATCH, HEADS, SLOTS, DIM)
    valid = torch.ones(BATCH, HEADS, SLOTS, dtype=torch.bool)
    positions = torch.arange(SLOTS, dtype=torch.int32).expand(BATCH, HEADS, -1)
    if op in ("redundancy", "mean_similarity"):
        return {"keys": keys, "valid" if op == "redundancy" else "takes_part": valid}
    if op == "window_importance":
        return {
            "queries": torch.randn(BATCH, HEADS, GROUP, QUERIES, DIM), "query_positions": positions[:, 0, -QUERIES:],
            "query_valid": valid[:, 0, :QUERIES], "keys": keys, "positions": positions, "valid": valid, "scale": 0.25,
        }  # fmt: skip
    if op == "top_k":
        counts = torch.full((BATCH, HEADS), 5)
        return {"scores": torch.randn(BATCH, HEADS, SLOTS), "counts": counts, "protected": ~valid, "valid": valid}
    if op == "compact":
        kept = KeepIndices(torch.arange(4).expand(BATCH, HEADS, -1), torch.full((BATCH, HEADS), 4))
        return {"tensor": keys, "kept": kept}
    blocks = ops.Blocks(torch.randn(2, 16, DIM), torch.randn(2, 16, DIM), torch.tensor([0, 1]), torch.tensor([16, 3]))
    return {
        "queries": torch.randn(BATCH, HEADS * GROUP, 1, DIM), "base": blocks,
        "tail_keys": keys, "tail_values": keys.clone(), "visible": None, "scale": 0.25,
    }  # fmt: skip


def changed(name, how):
    def change(given):
        given[name] = how(given[name])

    return change


def kept(how):
    return changed("kept", lambda k: k._replace(indices=how(k.indices)))


def block(**how):
    return changed("base", lambda b: b._replace(**{name: change(getattr(b, name)) for name, change in how.items()}))


WRONG = [
    ("redundancy", changed("keys", lambda t: t[0]), r"keys has shape \[3, 20, 16\]; give \[B, H, N, D\]"),
    ("redundancy", changed("keys", torch.Tensor.long), "keys is torch.int64; give a floating-point dtype"),
    ("redundancy", changed("valid", lambda t: t[:, :1]), r"valid has shape \[2, 1, 20\]; give \[2, 3, 20\]"),
    ("redundancy", changed("valid", torch.Tensor.float), "valid is torch.float32; give torch.bool"),
    ("redundancy", changed("valid", lambda t: t.to("meta")), "valid is on meta but other arguments are on cpu"),
    ("redundancy", lambda g: g.update(participates=g["valid"][:1]), r"participates has shape \[1, 3, 20\]"),
    ("redundancy", lambda g: g.update(beta=-1), "beta is -1"),
    ("redundancy", lambda g: g.update(spare="oldest"), "spare is 'oldest'"),
    ("mean_similarity", changed("takes_part", lambda t: t[..., 1:]), r"takes_part has shape \[2, 3, 19\]"),
    ("window_importance", changed("queries", lambda t: t[:, :1]), r"queries has shape \[2, 1, 2, 4, 16\]"),
    ("window_importance", changed("queries", lambda t: t.flatten(1, 2)), r"give \[B, H, G, Q, D\]"),
    ("window_importance", changed("queries", lambda t: t[..., :8]), r"give \[2, 3, 2, 4, 16\]"),
    ("window_importance", changed("query_positions", torch.Tensor.long), "query_positions is torch.int64"),
    ("window_importance", changed("query_valid", lambda t: t[:1]), r"query_valid has shape \[1, 4\]"),
    ("window_importance", changed("positions", lambda t: t[..., 1:]), r"positions has shape \[2, 3, 19\]"),
    ("window_importance", changed("valid", lambda t: t.to("meta")), "valid is on meta"),
    ("window_importance", lambda g: g.update(attention_sinks=torch.zeros(2, 3)), "attention_sinks has shape"),
    ("top_k", changed("scores", torch.Tensor.double), "scores is torch.float64; give torch.float32"),
    ("top_k", changed("scores", lambda t: t[0]), r"give \[B, H, N\]"),
    ("top_k", changed("counts", torch.Tensor.int), "counts is torch.int32; give torch.int64"),
    ("top_k", changed("counts", lambda t: t[:1]), r"counts has shape \[1, 3\]"),
    ("top_k", changed("protected", lambda t: t[:, :1]), r"protected has shape \[2, 1, 20\]"),
    ("top_k", changed("valid", lambda t: t[..., 1:]), r"valid has shape \[2, 3, 19\]"),
    ("compact", kept(torch.Tensor.int), r"kept\.indices is torch.int32; give torch.int64"),
    ("compact", kept(lambda t: t[:, :1]), r"kept\.indices has shape \[2, 1, 4\]"),
    ("compact", changed("tensor", lambda t: t[:, :, :3]), "4 columns but the storage holds 3 slots"),
    ("compact", changed("tensor", lambda t: t[0, 0]), r"give \[B, H, capacity, \.\.\.\]"),
    ("ragged_attention", changed("queries", lambda t: t[:, :5]), "5 heads, which is no multiple of the 3"),
    ("ragged_attention", changed("queries", lambda t: t[:1]), r"tail_keys has shape \[2, 3, 20, 16\]"),
    ("ragged_attention", changed("tail_keys", torch.Tensor.half), "tail_values is torch.float32; give torch.float16"),
    ("ragged_attention", changed("tail_values", lambda t: t[:, :1]), "tail_values has shape"),
    ("ragged_attention", block(keys=lambda t: t[..., :8]), r"base\.keys has shape"),
    ("ragged_attention", block(owner=torch.Tensor.int), r"base\.owner is torch.int32"),
    ("ragged_attention", block(filled=lambda t: t[:1]), r"base\.filled has shape \[1\]"),
    ("ragged_attention", lambda g: g.update(visible=torch.ones(1, 1, 1, 3, dtype=torch.bool)), "visible has shape"),
]


@pytest.mark.parametrize(("op", "spoil", "message"), WRONG)
def test_what_does_not_fit_is_refused_by_name(op, spoil, message):
    given = legal(op)
    getattr(ops, op)(**given)
    given = legal(op)
    spoil(given)
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**given)


@pytest.mark.parametrize("op", ["redundancy", "mean_similarity", "window_importance", "top_k", "ragged_attention"])
def test_strides_make_no_difference(op):
    given = legal(op)
    wanted = getattr(ops, op)(**given)
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 2:
            wide = torch.full((*tensor.shape[:2], tensor.shape[2] + 3, *tensor.shape[3:]), 1, dtype=tensor.dtype)
            wide[:, :, : tensor.shape[2]] = tensor
            given[name] = wide[:, :, : tensor.shape[2]]
    got = getattr(ops, op)(**given)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compaction_of_strided_storage():
    wide = torch.randn(BATCH, HEADS, DIM, SLOTS).transpose(2, 3)
    wanted = wide[:, :, [0, 3, 5, 9]].clone()
    indices = torch.tensor([0, 3, 5, 9]).expand(BATCH, HEADS, -1)
    ops.compact(wide, KeepIndices(indices, torch.full((BATCH, HEADS), 4)))
    assert torch.equal(wide[:, :, :4], wanted)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("index_zero", [False, True])
def test_a_bad_key_makes_its_head_not_finite_and_no_other(bad, index_zero):
    keys = torch.randn(BATCH, HEADS, SLOTS, DIM)
    valid = torch.ones(BATCH, HEADS, SLOTS, dtype=torch.bool)
    keys[1, 2, 7, 3] = bad
    got = ops.redundancy(keys, valid, index_zero=index_zero)
    assert not got[1, 2].isfinite().any()
    got[1, 2] = 0
    assert got.isfinite().all()
    given = legal("window_importance")
    given["keys"][1, 2, 7, 3] = bad
    got = ops.window_importance(**given)
    assert bad in (INF, -INF) or not got[1, 2].isfinite().all(), "a logit of minus infinity is one: no weight"
    got[1, 2] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_lies_outside_of_the_mask_is_never_read(bad):
    keys, valid = torch.randn(BATCH, HEADS, SLOTS, DIM), torch.rand(BATCH, HEADS, SLOTS) > 0.3
    wanted = ops.redundancy(keys, valid)
    assert torch.equal(ops.redundancy(keys.masked_fill(~valid.unsqueeze(-1), bad), valid), wanted)
    given = legal("window_importance") | {"valid": valid}
    wanted = ops.window_importance(**given)
    given["keys"] = given["keys"].masked_fill(~valid.unsqueeze(-1), bad)
    assert torch.equal(ops.window_importance(**given), wanted)


@pytest.mark.parametrize("queries", [0, QUERIES])
@pytest.mark.parametrize("slots", [0, 1, QUERIES])
def test_no_keys_and_fewer_keys_than_the_window_score_zero(slots, queries):
    keys, valid = torch.randn(1, 2, slots, DIM), torch.ones(1, 2, slots, dtype=torch.bool)
    positions = torch.arange(slots, dtype=torch.int32).expand(1, 2, -1)
    at = torch.arange(queries, dtype=torch.int32)[None]
    asked, asking = torch.ones(1, queries, dtype=torch.bool), torch.randn(1, 2, GROUP, queries, DIM)
    importance = ops.window_importance(asking, at, asked, keys, positions, valid, scale=0.25)
    assert torch.equal(importance, torch.zeros(1, 2, slots))
    assert ops.redundancy(keys, valid).shape == (1, 2, slots)
    counts = torch.full((1, 2), slots)
    assert ops.top_k(importance, counts, ~valid, valid).indices.tolist() == [[list(range(slots))] * 2]


def test_scores_that_are_not_finite_never_displace_anything():
    scores = torch.tensor([[[-INF, 1e38, -1e38, INF, NAN, 0.0, 9.0]]])
    valid = torch.tensor([[[True, True, True, True, True, True, False]]])
    nobody = torch.zeros_like(valid)

    def kept(count, protected=nobody):
        return ops.top_k(scores, torch.tensor([[count]]), protected, valid).indices[0, 0].tolist()

    assert kept(1) == [3]
    assert kept(4) == [1, 2, 3, 5], "NaN and minus infinity go first"
    assert kept(6) == [0, 1, 2, 3, 4, 5], "what is not valid is never kept"
    assert kept(1, nobody | scores.isnan()) == [4], "protected, even if NaN"
