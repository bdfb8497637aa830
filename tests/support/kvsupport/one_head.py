"""A view as the oracle sees it: one KV head of one row, without what is not valid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.contracts.view import CacheView
from kvsupport.events import LayerInfo
from kvsupport.oracle_scores import HeadView


def heads_of(view: CacheView) -> Iterator[tuple[int, int, Tensor, HeadView]]:
    """Yield row, head, the slots that hold an entry `[n]`, and what the oracle makes of them.

    Slot state is what scorers of the oracle remember under the same name.
    """
    if view.queries is None or view.query_positions is None or view.query_valid is None:
        raise ValueError("the view holds no queries")
    groups, projection = view.queries.shape[2], view.extras.get("output_projection")
    info = LayerInfo(
        view.shape[1],
        groups,
        view.scale,
        view.softcap,
        view.attention_sinks,
        None if view.rope is None else view.rope.inv_freq,
        output_projection=projection,
    )
    for b in range(view.shape[0]):
        columns = [int(q) for q in view.query_positions[b].argsort() if view.query_valid[b, q]]
        for h in range(view.shape[1]):
            slots = view.valid[b, h].nonzero()[:, 0]
            positions = view.positions[b, h, slots].tolist()
            yield b, h, slots, HeadView(
                positions=positions,
                keys=view.keys[b, h, slots].double(),
                values=view.values[b, h, slots].double(),
                turned_to=positions,
                queries=view.queries[b, h][:, columns].double().transpose(0, 1),
                query_positions=view.query_positions[b, columns].tolist(),
                hidden=lambda: torch.empty(0),
                asked=lambda: torch.empty(0),
                history=list,
                memory={},
                info=info,
                layer=view.layer_idx,
                head=h,
                sinks=None if view.attention_sinks is None else view.attention_sinks[h].double(),
                compactions=int(view.compaction[b]),
                seen=int(view.seen[b]),
                budget=0 if view.budget is None else int(view.budget[b]),
            )  # fmt: skip
