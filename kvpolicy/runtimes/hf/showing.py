"""How a cache shows itself: in a line, as a small table in a notebook, and as a picture of what it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvpolicy.errors import CacheStateError
from kvpolicy.html_text import facts, size
from kvpolicy.pictures import new_figure
from kvpolicy.runtimes.hf.stats import collect

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvpolicy.cache.engine import Engine
    from kvpolicy.policy.policy import Policy


class ShownCache:
    """What a `PolicyCache` has to say of itself; reading it changes nothing, and runs no compaction that is due."""

    policy: Policy
    model: PreTrainedModel

    @property
    def engine(self) -> Engine:
        """The engine behind this cache."""
        raise NotImplementedError

    def kept(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Return the original positions that a KV head of a layer holds."""
        raise NotImplementedError

    def __repr__(self) -> str:
        engine = self.engine
        held = f"{engine.rows[0].resident:,} of {engine.rows[0].seen:,} tokens" if engine.rows else "empty"
        more = f", {len(engine.rows)} rows" if len(engine.rows) > 1 else ""
        name = type(self.model).__name__
        return f"PolicyCache({self.policy.name!r}, {name}, {len(engine.layers)} layers, {held}{more})"

    def _repr_html_(self) -> str:
        stats, policy = collect(self.engine), self.policy
        bound = "no bound while decoding" if policy.bound is None else f"at most {policy.bound:,} while decoding"
        return facts(
            f"PolicyCache: {policy.name}",
            [
                ("model", f"{type(self.model).__name__}, {len(self.engine.layers)} layers"),
                ("rows", len(self.engine.rows)),
                ("entries", f"{stats.resident:,} of {stats.seen:,} tokens ({bound})"),
                ("compactions", stats.compactions),
                ("bytes", f"{size(stats.bytes_resident)} held, {size(stats.bytes_allocated)} allocated"),
            ],
        )

    def plot(self, row: int = 0) -> Figure:
        """Draw what a row holds: for each layer and position the share of KV heads that still have it.

        Needs matplotlib, and is no command of it: the figure is returned and not shown, as notebooks show what a cell
        returns.

        Args:
            row: which row of the batch.

        Returns:
            A matplotlib figure: positions from left to right, layers from top to bottom.

        Raises:
            CacheStateError: nothing has been cached, or there is no such row.
            KVPolicyError: matplotlib is not installed.
        """
        share = self._shares(row)
        figure = new_figure(8, max(1.6, min(0.16 * share.shape[0] + 1.0, 6.0)))
        axes: Any = figure.add_subplot()
        image = axes.imshow(share.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=1.0)
        figure.colorbar(image, ax=axes, label="KV heads that hold it")
        axes.set_xlabel("position in the text")
        axes.set_ylabel("layer")
        step = max(1, -(-len(self.engine.layers) // 10))
        axes.set_yticks(range(0, share.shape[0], step), self.engine.layers[::step])
        of_row = f", row {row}" if len(self.engine.rows) > 1 else ""
        # The name may be anybody's: no formula is made of it.
        axes.set_title(f"{self.policy.name}: what is held{of_row}", fontsize="medium", parse_math=False)
        return figure

    def _shares(self, row: int) -> Tensor:
        """Return the share of heads that hold a position, fp32 `[L, seen]` on the CPU."""
        layers, stores, rows = self.engine.layers, self.engine.stores, self.engine.rows
        if not rows or layers[0] not in stores:
            raise CacheStateError("plot: nothing has been cached; generate with the cache first.")
        if not 0 <= row < len(rows):
            raise CacheStateError(f"plot: there is no row {row}; the cache holds {len(rows)}.")
        share = torch.zeros(len(layers), rows[row].seen)
        for i, layer in enumerate(layers):
            heads = stores[layer].layout.heads
            for head in range(heads):
                share[i, self.kept(layer, head, row)] += 1 / heads
        return share
