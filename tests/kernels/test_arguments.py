"""Arguments that do not fit together never reach a kernel: the check stands before the choice of a backend."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import KeepIndices


@pytest.fixture
def good(device):
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 20, 16, device=device, dtype=torch.float16)
    valid = torch.ones(1, 2, 20, dtype=torch.bool, device=device)
    counts = torch.full((1, 2), 3, device=device)
    kept = KeepIndices(torch.arange(3, device=device).expand(1, 2, -1), counts)
    return keys, valid, counts, kept


def test_what_does_not_fit_is_refused_by_name(good, device):
    keys, valid, counts, kept = good
    positions = torch.arange(20, dtype=torch.int32, device=device).expand(1, 2, -1)
    at, asked, queries = positions[:, 0, -4:], valid[:, 0, :4], keys[:, :, None, :4]
    blocks = ops.Blocks(keys[0, :1, :16], keys[0, :1, :16], counts[0, :1] * 0, counts[0, :1])
    scores = torch.randn(1, 2, 20, device=device)
    calls = {
        "keys has shape": lambda: ops.redundancy(keys[0], valid),
        "valid has shape": lambda: ops.redundancy(keys, valid[:, :1]),
        "participates has shape": lambda: ops.redundancy(keys, valid, participates=valid[:, :1]),
        "takes_part is": lambda: ops.mean_similarity(keys, valid.float()),
        "queries has shape": lambda: ops.window_importance(queries[0], at, asked, keys, positions, valid, scale=1.0),
        "positions is": lambda: ops.window_importance(queries, at, asked, keys, positions.long(), valid, scale=1.0),
        "counts is": lambda: ops.top_k(scores, counts.int(), ~valid, valid, width=3),
        "protected has shape": lambda: ops.top_k(scores, counts, ~valid[:, :1], valid, width=3),
        "kept.indices has 3 columns": lambda: ops.compact(keys[:, :, :2], kept),
        "no multiple of the 2 KV heads": lambda: ops.ragged_attention(
            keys[:, :1, :1].expand(-1, 3, -1, -1), blocks, keys, keys, None, scale=1.0
        ),
    }
    with ops.using_backend("triton"):
        for message, call in calls.items():
            with pytest.raises(ValueError, match=message):
                call()


def test_layouts_without_a_kernel_are_refused_and_auto_takes_torch(good, device):
    keys, valid, _, _ = good
    across = keys.transpose(2, 3).contiguous().transpose(2, 3)
    with ops.using_backend("triton"), pytest.raises(UnsupportedError, match="head dim must be contiguous"):
        ops.redundancy(across, valid)
    with ops.using_backend("auto"):
        torch.testing.assert_close(ops.redundancy(across, valid), ops.redundancy(keys.contiguous(), valid))
    assert across.device.type == device.type
