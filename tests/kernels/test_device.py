"""What only a device can show: launches without a stop of the host, captured in a graph."""

from __future__ import annotations

import pytest
import torch

from kvpolicy_kernels import compaction, selection, similarity, window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")


@pytest.mark.usefixtures("seed")
def test_a_whole_compaction_is_captured_and_replayed(device):
    batch, heads, n, dim, keep = 4, 2, 1152, 128, 1024

    def inputs():
        keys = torch.randn(batch, heads, 1, dim, device=device) + torch.randn(batch, heads, n, dim, device=device)
        return keys.half(), torch.randn(batch, heads, 4, 8, dim, device=device).half()

    keys, queries = inputs()
    positions = torch.arange(n, dtype=torch.int32, device=device).expand(batch, heads, n)
    at = positions[:, 0, -8:].contiguous()
    asked = torch.ones(batch, 8, dtype=torch.bool, device=device)
    valid = torch.ones(batch, heads, n, dtype=torch.bool, device=device)
    protected = positions >= n - 8
    counts = torch.full((batch, heads), keep, device=device)

    def compress(keys, queries):
        importance = window.window_importance(queries, at, asked, keys, positions, valid, scale=dim**-0.5)
        score = 0.1 * importance - 0.9 * similarity.redundancy(keys, valid)
        kept = selection.top_k(score, counts, protected, valid, width=keep)
        compaction.compact(keys, kept)
        return kept.indices

    compress(keys.clone(), queries)  # compiles
    static = keys.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = compress(static, queries)
    for _ in range(3):
        fresh, asking = inputs()
        queries.copy_(asking)
        static.copy_(fresh)
        graph.replay()
        want = compress(fresh, queries)
        assert torch.equal(kept, want)
        assert torch.equal(static, fresh)
