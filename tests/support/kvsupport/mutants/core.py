"""Breaks the engine, the store and the policy themselves, under a policy that shows it."""

# ruff: noqa: E501

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import kvpolicy
from kvpolicy.cache import engine
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.ledger import Ledger, RowCounts
from kvpolicy.cache.queries.log import QueryLog, Window
from kvpolicy.cache.store import ArenaStore
from kvpolicy.contracts.components import Slots
from kvpolicy.contracts.view import CacheView
from kvpolicy.loading.installed import catalog
from kvpolicy.policy import decide
from kvpolicy.policy.policy import Policy
from kvpolicy.types import KeepIndices
from kvsupport.mutants import parts
from kvsupport.mutants._base import Mutant, patched

_engine_module: Any = engine
_compact, _reset, _view, _clone = ArenaStore.compact, Engine.reset, Engine.view, ArenaStore.clone
_append_slots, _take_rows, _crop = ArenaStore.append_slots, Engine.take_rows, Engine.crop
_window, _log_rows, _log_crop, _plan = QueryLog.window, QueryLog.rows, QueryLog.crop, _engine_module.plan_forward
_decide, _masks, _share = Policy.decide, decide.masks, decide.share
_store_rows, _fires = ArenaStore.rows, Ledger._fires


def _without(names: tuple[str, ...]) -> Any:
    def compact(self: ArenaStore, layer: int, rows: slice, kept: KeepIndices) -> None:
        held = {name: getattr(self, name).clone() for name in names if name != "state"}
        states = {name: t.clone() for name, t in self.state.items()} if "state" in names else {}
        _compact(self, layer, rows, kept)
        for name, old in held.items():
            getattr(self, name).copy_(old)
        for name, old in states.items():
            self.state[name].copy_(old)

    return compact


def _indices_of_first_row(self: ArenaStore, layer: int, rows: slice, kept: KeepIndices) -> None:
    _compact(self, layer, rows, KeepIndices(kept.indices[:1].expand_as(kept.indices).contiguous(), kept.lengths))


def _indices_of_first_head(self: ArenaStore, layer: int, rows: slice, kept: KeepIndices) -> None:
    _compact(self, layer, rows, KeepIndices(kept.indices[:, :1].expand_as(kept.indices).contiguous(), kept.lengths))


def _first_layer(self: ArenaStore, layer: int, rows: slice, kept: KeepIndices) -> None:
    _compact(self, self.layers[0], rows, kept)


def _reset_but(*names: str) -> Any:
    def reset(self: Engine) -> None:
        old = {name: self.__dict__.get(name) for name in names}
        _reset(self)
        self.__dict__.update({name: value for name, value in old.items() if value is not None})

    return reset


def _append_without_fill(self: ArenaStore, plan: Any) -> None:
    states, self.states = self.states, ()
    try:
        _append_slots(self, plan)
    finally:
        self.states = states


def _rows_without_log(self: Engine, index: Tensor) -> None:
    log, self.log = self.log, QueryLog(0, feeds_attention=False)
    _take_rows(self, index)
    self.log = log


def _rows_without_counters(self: Engine, index: Tensor) -> None:
    old = self.rows
    _take_rows(self, index)
    self.ledger.rows = {i: replace(old[min(i, len(old) - 1)]) for i in range(index.numel())}


def _rows_without_state(self: ArenaStore, index: Tensor) -> None:
    old = dict(self.state)
    _store_rows(self, index)
    count = index.numel()
    self.state = {n: t[:, torch.arange(count).clamp(max=t.shape[1] - 1)].clone() for n, t in old.items()}


def _crop_keeps_entries(self: Engine, columns: int) -> None:
    held = [row.resident for row in self.rows]
    _crop(self, columns)
    for row, resident in zip(self.rows, held, strict=True):
        row.resident = resident


def _window_shifted(self: QueryLog) -> Window | None:
    self.observe += 1
    try:
        seen = _window(self)
    finally:
        self.observe -= 1
    if seen is None or seen.positions.shape[1] < 2:
        return seen
    index = seen.index
    if index is None:
        total = sum(r.width for r in self.records)
        count = seen.positions.shape[1]
        index = torch.arange(total - count, total).expand(seen.positions.shape[0], -1)
    return Window(seen.positions[:, :-1], seen.valid[:, :-1], index[:, :-1])


def _groups_swapped(self: Engine, *of: Any) -> CacheView:
    view = _view(self, *of)
    if view.queries is None:
        return view
    batch, heads, group, *rest = view.queries.shape
    return replace(view, queries=view.queries.reshape(batch, group, heads, *rest).transpose(1, 2))


def _positions_from_length(rows: Any, *rest: Any) -> Any:
    return _plan([replace(row, seen=row.resident) for row in rows], *rest)


def _pads_stored(rows: Any, used: Any, columns: int, counts: Any, valid: Any, device: Any) -> Any:
    forward = _plan(rows, used, columns, counts, valid, device)
    if valid is None or forward.plan.column is None:
        return forward
    wrong = forward.plan.column - (columns - torch.tensor(counts))[forward.plan.row]
    forward.plan = replace(forward.plan, column=wrong)
    return forward


def _first_row_decides(self: Ledger[int], counts: RowCounts, incoming: int) -> bool:
    return _fires(self, self.rows[0], incoming)


def _one_more_than_budget(self: Policy, views: Any, budget: Any, *ranks: Any) -> Any:
    return _decide(self, views, [n + 1 for n in budget], *ranks)


def _counter_of_batch(self: Engine, *of: Any) -> CacheView:
    view = _view(self, *of)
    return replace(view, compaction=torch.full_like(view.compaction, sum(r.compactions for r in self.rows)))


def _pads_allowed(parts: Any, view: CacheView, *watch: Any) -> tuple[Tensor, Tensor]:
    protected, allowed = _masks(parts, view, *watch)
    return protected, torch.ones_like(allowed)


def _drops_protection(parts: Any, view: CacheView, *watch: Any) -> tuple[Tensor, Tensor]:
    protected, allowed = _masks(parts, view, *watch)
    first = protected & (protected.cumsum(-1) == 1)
    return protected & ~first, allowed


def _clone_shares(self: ArenaStore) -> ArenaStore:
    return self


def _observes_twice(self: Engine, leave: int = 0) -> None:
    waiting = [r.unobserved for r in self.log.records]
    _observe(self, leave)
    if not any(r.unobserved for r in self.log.records):
        for record, columns in zip(self.log.records, waiting, strict=True):
            record.unobserved = min(columns, 1)
        _observe(self, leave)


_observe = Engine.observe


def _ties(self: Any, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
    return parts.TiesToNewest().select(scores, counts, protected, valid, slots)


def _top_k() -> Any:
    return catalog().get("selector", "top_k")


def _selector(select: Any) -> Any:
    return lambda: patched((_top_k(), "select", select))()  # noqa: PLW0108  # the catalog is read when it is used


def _unshared(selector: Any, scoring: Any) -> Any:
    alone: Any = SimpleNamespace(scope="head", reduce=selector.reduce)
    return _share(alone, scoring)


def _shared_knorm() -> Any:
    return kvpolicy.load("knorm").replace("selector.scope", "layer")


def _whatever_the_phase(self: Ledger[int], counts: RowCounts, incoming: int) -> bool:
    return _fires(self, replace(counts, last="decode"), incoming)


def _ledger(name: str, new: Any) -> Any:
    return patched((Ledger, name, new))


def _store(name: str, new: Any) -> Any:
    return patched((ArenaStore, name, new))


def _engine(name: str, new: Any) -> Any:
    return patched((Engine, name, new))


MUTANTS = (
    Mutant("slot state not gathered", "state not gathered", "h2o", _store("compact", _without(("state",)))),
    Mutant("positions not gathered", "mask not gathered", "rkv", _store("compact", _without(("positions",)))),
    Mutant("values not gathered", "one tensor forgotten", "rkv", _store("compact", _without(("values",)))),
    Mutant("first row's indices for all rows", "batch 0 only", "knorm", _store("compact", _indices_of_first_row)),
    Mutant("first head's indices for all heads", "GQA gather", "knorm", _store("compact", _indices_of_first_head)),
    Mutant("first layer compacted for all", "one buffer for all layers", "rkv", _store("compact", _first_layer)),
    Mutant("slot state of a reused slot not cleared", "stale state", "h2o",
           _store("append_slots", _append_without_fill)),
    Mutant("reset keeps the entries", "stale state between generations", "rkv", _engine("reset", _reset_but("ledger", "stores", "facts", "_used"))),
    Mutant("reset keeps the queries", "stale state between generations", "rkv", _engine("reset", _reset_but("log"))),
    Mutant("reset keeps the counters", "R-KV length, kv_seq_len", "rkv", _engine("reset", _reset_but("ledger"))),
    Mutant("reordering forgets the queries", "beam search", "snapkv", _engine("take_rows", _rows_without_log)),
    Mutant("reordering forgets the counters", "beam search", "rkv", _engine("take_rows", _rows_without_counters)),
    Mutant("reordering forgets the slot state", "beam search", "h2o", _store("rows", _rows_without_state)),
    Mutant("crop keeps the entries", "assisted decoding", "rkv", _engine("crop", _crop_keeps_entries)),
    Mutant("crop keeps the queries", "assisted decoding", "rkv", patched((QueryLog, "crop", lambda self, columns: None))),
    Mutant("a fork shares its memory", "fork", "rkv", _store("clone", _clone_shares)),
    Mutant("query window shifted by one", "off-by-one in the window", "rkv", patched((QueryLog, "window", _window_shifted))),
    Mutant("query heads in the wrong order", "GQA layout", "rkv", _engine("view", _groups_swapped)),
    Mutant("attention observed twice", "H2O: sums of a chunk twice", "h2o", _engine("observe", _observes_twice)),
    Mutant("positions from the cache length", "vLLM num_dropped", "sinks-recent",
           patched((_engine_module, "plan_forward", _positions_from_length))),
    Mutant("padding stored", "pads scored as tokens", "knorm", patched((_engine_module, "plan_forward", _pads_stored))),
    Mutant("the first row decides when", "batch 0 only", "rkv", _ledger("_fires", _first_row_decides)),
    Mutant("budget plus one", "n < B + 1", "rkv", patched((Policy, "decide", _one_more_than_budget))),
    Mutant("random numbers count the batch's compactions", "a row in a batch differs", "random",
           _engine("view", _counter_of_batch)),
    Mutant("padding may be kept", "pads kept", "knorm", patched((decide, "masks", _pads_allowed))),
    Mutant("first protected entry forgotten", "sinks evicted", "rkv", patched((decide, "masks", _drops_protection))),
    Mutant("heads choose alone under a shared scope", "one block table per layer", _shared_knorm,
           patched((decide, "share", _unshared))),
    Mutant("prompt compacted in phase decode", "phase", "rkv", _ledger("_fires", _whatever_the_phase)),
    Mutant("ties to the highest slot", "ties differ between backends", "knorm", _selector(_ties)),
)  # fmt: skip
