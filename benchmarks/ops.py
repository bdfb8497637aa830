"""Milliseconds of the operations of one compaction of one layer, on one thread: ``python -P benchmarks/ops.py``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kvpolicy import ops


def best(step: Callable[[], object], repeats: int = 7) -> float:
    """Return the fastest of some runs, in milliseconds; the machine may be shared."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Print one line per size; `share` makes keys alike, as real ones are (most cosines above 0.5), or unrelated."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    group, dim, observe = 3, 64, 8
    print("heads  slots  keys       redundancy  importance  top_k  compact")
    for heads, slots in ((3, 384), (3, 1152), (24, 1152), (3, 4224)):
        for kind, share in (("alike", 1.2), ("unrelated", 0.0)):
            keys = share * torch.randn(1, heads, 1, dim) + torch.randn(1, heads, slots, dim)
            valid = torch.ones(1, heads, slots, dtype=torch.bool)
            positions = torch.arange(slots, dtype=torch.int32).expand(1, heads, slots)
            queries = torch.randn(1, heads, group, observe, dim)
            at, asked = positions[:, 0, -observe:], torch.ones(1, observe, dtype=torch.bool)
            scores, counts = torch.randn(1, heads, slots), torch.full((1, heads), slots - 128)
            kept = ops.top_k(scores, counts, ~valid, valid)
            steps = (
                lambda k=keys, v=valid: ops.redundancy(k, v),
                lambda q=queries, k=keys, p=positions, v=valid, a=at, m=asked: ops.window_importance(
                    q, a, m, k, p, v, scale=dim**-0.5
                ),
                lambda s=scores, c=counts, v=valid: ops.top_k(s, c, ~v, v),
                lambda k=keys, i=kept: ops.compact(k, i),
            )
            redundancy, importance, top_k, compact = map(best, steps)
            print(
                f"{heads:5}  {slots:5}  {kind:9}  {redundancy:10.2f}  {importance:10.2f}  {top_k:5.2f}  {compact:7.2f}"
            )


if __name__ == "__main__":
    main()
