"""The engine once more, in plain Python: which positions every head of every row holds after each forward pass.

`compare` replays a `Trace` under a policy's parameters and says where the recorded cache holds something else.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.loading.installed import catalog
from kvpolicy.policy.policy import Policy
from kvsupport import oracle_memory as memory
from kvsupport import oracle_outputs as outputs
from kvsupport import oracle_scores as scores
from kvsupport import oracle_statistics as statistics
from kvsupport.events import Crop, PassEvent, RowsTaken, Settled, Trace
from kvsupport.oracle_rows import TOLERANCE, OracleReport, OracleRow, Sets, near_tie

_IMPORTANCE = {**scores.IMPORTANCE, **memory.IMPORTANCE, **outputs.IMPORTANCE, **statistics.IMPORTANCE}
_MIXERS = {**scores.MIXERS, **outputs.MIXERS}
_REDUNDANCY = {**scores.REDUNDANCY, **memory.REDUNDANCY, **statistics.REDUNDANCY}


def knows(policy: Policy) -> bool:
    """Say whether the oracle can replay a policy; `kvsupport.audit` checks what holds under any."""
    named = [_name(c) in _IMPORTANCE for c in policy.components if isinstance(c, ImportanceScorer)]
    return (
        all(named) and _name(policy.redundancy) in _REDUNDANCY and _name(policy.mixer) in _MIXERS and _selects(policy)
    )


def _selects(policy: Policy) -> bool:
    plain = (_name(policy.allocator), _name(policy.selector)) == ("uniform", "top_k")
    return plain and {_name(post) for post in policy.post} <= {"rerotate"}


class Oracle:
    """Replays a trace under one policy.

    Args:
        trace: what was recorded.
        policy: only names and parameters of its components are used.
        scorers: further scorers by registered name, for components of other packages.
    """

    def __init__(self, trace: Trace, policy: Policy, scorers: dict[str, scores.Scorer] | None = None) -> None:
        self.trace = trace
        self.policy = policy
        self.importance = {**_IMPORTANCE, **(scorers or {})}[_name(policy.importance)]
        self.memories = {_name(c): c for c in policy.components if _name(c) in memory.REMEMBER}
        self.redundancy = {**_REDUNDANCY, **(scorers or {})}[_name(policy.redundancy)]
        self.mixer = _MIXERS[_name(policy.mixer)]
        self.trigger = _name(policy.trigger)
        self.rerotates = [_name(post) for post in policy.post] == ["rerotate"]
        if not _selects(policy):
            raise NotImplementedError(
                "the oracle knows the allocator uniform, the selector top_k and no post but rerotate"
            )
        self.rows: list[OracleRow] = []
        self.layers = sorted(trace.layers)
        self.prefill = True
        self.report = OracleReport()

    def run(self) -> OracleReport:
        """Replay every event."""
        for number, event in enumerate(self.trace.events):
            if isinstance(event, PassEvent):
                self._forward(event, f"event {number}")
            elif isinstance(event, Settled):
                for b, row in enumerate(self.rows):
                    self._compact_if_due(row, 1, {i: event.held[i][b] for i in self.layers}, f"event {number}, row {b}")
            elif isinstance(event, RowsTaken):
                self.rows = [self.rows[b].copy() for b in event.index]
            elif isinstance(event, Crop):
                for row in self.rows:
                    self._crop(row, event.columns)
                if all(row.seen == row.prompt for row in self.rows):  # only the prompt is left
                    self.prefill = True
                    for row in self.rows:
                        row.decoded = False
        return self.report

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def _forward(self, event: PassEvent, where: str) -> None:
        valid = event.valid.tolist()
        if not self.rows:
            self.rows = [OracleRow.empty({i: self.trace.layers[i].heads for i in self.layers}) for _ in valid]
        for b, row in enumerate(self.rows):
            recorded = {}
            for i in self.layers:
                noted = event.layers[i]
                held = noted.held[b]
                recorded[i] = [[p for p in positions if p < row.seen] for positions in held]
                new = list(range(row.seen, row.seen + sum(valid[b])))
                if any(positions[len(positions) - len(new) :] != new for positions in held):
                    self.report.mismatches.append(f"{where}, row {b}, layer {i}: the new tokens are not at the end")
            self._compact_if_due(row, sum(valid[b]), recorded, f"{where}, row {b}")
            self._append(row, b, event, valid[b])
            self._check_outputs(row, b, event, valid[b])
        self.prefill = event.prefill

    def _append(self, row: OracleRow, b: int, event: PassEvent, valid: list[bool]) -> None:
        for column, real in enumerate(valid):
            if not real:
                continue
            for i in self.layers:
                noted, info = event.layers[i], self.trace.layers[i]
                if noted.queries is None:
                    raise ValueError("the trace lacks queries: a forward pass stopped half-way")
                row.keys[i].append(noted.keys[b, :, column])
                row.values[i].append(noted.values[b, :, column])
                row.queries[i].append(noted.queries[b, :, column].unflatten(0, (info.heads, info.groups)))
                if noted.hidden is not None:
                    row.hidden[i].append(noted.hidden[b, column])
                for h in range(info.heads):
                    position = len(row.keys[i]) - 1
                    row.held[i][h].append(position)
                    row.turned[i][h][position] = position - row.shift
        row.columns.extend(valid)
        row.decoded = row.decoded or not event.prefill
        if not row.decoded:
            row.prompt = row.seen

    def _crop(self, row: OracleRow, columns: int) -> None:
        if columns == 0:
            return
        del row.columns[len(row.columns) - columns :]
        for i in self.layers:
            for history in (row.keys[i], row.values[i], row.queries[i], row.hidden[i]):
                del history[row.seen :]
            row.held[i] = [[p for p in held if p < row.seen] for held in row.held[i]]
        row.prompt = min(row.prompt, row.seen)

    # -- compaction ---------------------------------------------------------------------------------------------------

    def _entries(self, row: OracleRow) -> int:
        """Entries to hold after a compaction."""
        budget = self.policy.budget
        if budget.tokens is not None:
            return budget.tokens
        reserved = sum(
            row.prompt if name == "prompt" else getattr(part, "count", 0) for name, part in self._protections()
        )
        return min(row.seen, max(math.ceil((budget.fraction or 0) * row.seen - 1e-9), reserved, 1))

    def _protections(self) -> list[tuple[str, Any]]:
        return [(_name(part), part) for part in self.policy.protections]

    def _due(self, row: OracleRow, incoming: int) -> bool:
        phase = "prefill" if self.prefill else "decode"
        if incoming == 0 or not row.columns or self.policy.phase not in ("both", phase):
            return False
        resident, entries = len(row.held[self.layers[0]][0]), self._entries(row)
        if self.trigger == "each_step":
            return resident > entries
        p: Any = self.policy.trigger
        if resident <= entries or resident + incoming <= entries + max(p.interval, incoming):
            return False
        # Waiting for the multiple is only possible while the buffer of interval + align - 1 entries lasts.
        if resident + incoming > entries + max(p.interval + p.align - 1, incoming):
            return True
        return row.seen % int(p.align) == 0

    def _compact_if_due(self, row: OracleRow, incoming: int, recorded: dict[int, Sets], where: str) -> None:
        if not self._due(row, incoming):
            for i in self.layers:
                if recorded[i] != row.held[i]:
                    self.report.mismatches.append(f"{where}, layer {i}: compacted when no compaction was due")
                    self._adopt(row, recorded)
                    return
            return
        heads = {(i, h): self._head(row, i, h) for i in self.layers for h in range(self.trace.layers[i].heads)}
        retention = {key: self._retention(head) for key, head in heads.items()}
        protected = {key: self._protected(row, head.positions) for key, head in heads.items()}
        memories = {key: self._remembered(head) for key, head in heads.items()}
        for group in self._shared():
            score = self._reduced([retention[key] for key in group], group)
            positions = heads[group[0]].positions
            safe = [any(protected[key][n] for key in group) for n in range(len(positions))]
            count = min(self._entries(row), len(positions))
            order = sorted((not safe[n], -value, n) for n, value in enumerate(score.tolist()))
            competing = [value for value, stays in zip(score.tolist(), safe, strict=True) if not stays]
            close = self._nearest_cosine(heads[group[0]]) < TOLERANCE  # one set for several heads has no such policy
            self.report.near_ties += len(group) * (close or near_tie(competing, count - sum(safe)))
            kept = sorted(positions[n] for _, _, n in order[:count])
            for i, h in group:
                self.report.decisions += 1
                self.report.evictions += len(positions) - count
                if recorded[i][h] != kept:
                    self._differs(kept, recorded[i][h], heads[i, h], score, f"{where}, layer {i}, head {h}")
        for (i, h), state in memories.items():
            row.memory[i][h] = state
        self._adopt(row, recorded)
        row.compactions += 1
        row.observed = row.seen
        if self.rerotates:
            for i in self.layers:
                row.turned[i] = [{position: n for n, position in enumerate(held)} for held in row.held[i]]
            row.shift = row.seen - len(row.held[self.layers[0]][0])

    def _remembered(self, head: scores.HeadView) -> dict[str, dict[int, float]]:
        """Return what the scorers remember of each entry from this compaction on."""
        found: dict[str, dict[int, float]] = {}
        for name, component in self.memories.items():
            for part, values in memory.REMEMBER[name](component, head).items():
                pairs = zip(head.positions, values, strict=True)
                found[part] = {position: value for position, value in pairs if value is not None}
        return found

    @staticmethod
    def _adopt(row: OracleRow, recorded: dict[int, Sets]) -> None:
        row.held = {i: [list(held) for held in sets] for i, sets in recorded.items()}

    def _shared(self) -> list[list[tuple[int, int]]]:
        """Group the (layer, head) pairs that keep the same set."""
        pairs = [[(i, h) for h in range(self.trace.layers[i].heads)] for i in self.layers]
        if self.policy.selector.scope == "head":
            return [[pair] for layer in pairs for pair in layer]
        return pairs if self.policy.selector.scope == "layer" else [[pair for layer in pairs for pair in layer]]

    def _reduced(self, retention: list[Tensor], group: list[tuple[int, int]]) -> Tensor:
        how = self.policy.selector.reduce

        def over(rows: list[Tensor]) -> Tensor:
            stacked = torch.stack(rows)
            if how == "max":
                return stacked.max(0).values
            return stacked.mean(0) if how == "mean" else stacked.sum(0)

        layers = sorted({i for i, _ in group})
        # First over the heads of each layer, then over layers: the means differ where layers have different heads.
        return over([over([r for r, (i, _) in zip(retention, group, strict=True) if i == layer]) for layer in layers])

    def _head(self, row: OracleRow, i: int, h: int) -> scores.HeadView:
        info, held = self.trace.layers[i], row.held[i][h]
        places = [row.turned[i][h][p] for p in held]
        keys = torch.stack([row.keys[i][p][h].double() for p in held])
        first = max(0, row.seen - max(self.policy.observed_queries, 1))
        queries = torch.stack([row.queries[i][p][h].double() for p in range(first, row.seen)])
        sinks = None if info.attention_sinks is None else info.attention_sinks[h].double()
        view = scores.HeadView(
            positions=list(held),
            keys=scores.turn(keys, info, [place - p for place, p in zip(places, held, strict=True)]),
            values=torch.stack([row.values[i][p][h].double() for p in held]),
            turned_to=places,
            queries=self._turned_queries(queries, i, row),
            query_positions=list(range(first, row.seen)),
            hidden=lambda: torch.stack([row.hidden[i][p].double() for p in held]),
            asked=lambda: torch.stack([query[h].double() for query in row.queries[i]]),
            history=cache(lambda: self._history(row, i, h, view)),
            memory=row.memory[i][h],
            info=info,
            layer=i,
            head=h,
            sinks=sinks,
            compactions=row.compactions,
            seen=row.seen,
            budget=self._entries(row),
        )
        return view

    def _turned_queries(self, queries: Tensor, i: int, row: OracleRow) -> Tensor:
        flat = queries.flatten(0, 1)
        return scores.turn(flat, self.trace.layers[i], [-row.shift] * len(flat)).view_as(queries)

    def _history(self, row: OracleRow, i: int, h: int, view: scores.HeadView) -> list[tuple[int, Tensor]]:
        """Return the attention of every query since the last compaction: nothing has been evicted in between."""
        found = []
        sinks = [None] * view.info.groups if view.sinks is None else view.sinks.tolist()
        for position in range(row.observed, row.seen):
            query = self._turned_queries(row.queries[i][position][None, h].double(), i, row)[0]
            visible = [p <= position for p in view.positions]
            lines = zip(scores.logits_of(query, view.keys, view.info), sinks, strict=True)
            found.append((position, torch.stack([scores.softmax_among(line, visible, sink) for line, sink in lines])))
        return found

    def _retention(self, head: scores.HeadView) -> Tensor:
        zero = torch.zeros(len(head.positions), dtype=torch.float64)
        mixer = self.policy.mixer
        importance = scores.asked(self.importance, self.policy.importance, head) if mixer.uses_importance else zero
        redundancy = scores.asked(self.redundancy, self.policy.redundancy, head) if mixer.uses_redundancy else zero
        return self.mixer(mixer, importance, redundancy, head)

    def _protected(self, row: OracleRow, positions: list[int]) -> list[bool]:
        limit = {"sinks": 0, "prompt": 0}
        newest: list[int] = []
        for name, part in self._protections():
            if name == "sinks":
                limit["sinks"] = part.count
            elif name == "prompt":
                limit["prompt"] = row.prompt
            elif name == "recent":
                newest = positions[max(len(positions) - part.count, 0) :]
            elif name != "pads":
                raise NotImplementedError(f"the oracle does not know the protection {name}")
        return [p < max(limit.values()) or p in newest for p in positions]

    def _differs(self, kept: list[int], recorded: list[int], head: scores.HeadView, score: Tensor, where: str) -> None:
        ours, theirs = sorted(set(kept) - set(recorded)), sorted(set(recorded) - set(kept))
        text = f"{where}: the oracle keeps {ours}, the cache {theirs}"
        known = {*kept, *recorded} <= set(head.positions)
        if len(ours) != len(theirs) or len(kept) != len(recorded) or not known:
            self.report.mismatches.append(f"{where}: {len(kept)} entries expected, {len(recorded)} recorded; {text}")
            return
        value = dict(zip(head.positions, score.tolist(), strict=True))
        slack = max(value[p] for p in ours) - min(value[p] for p in theirs)
        allowed = TOLERANCE * max(1.0, *(abs(value[p]) for p in ours + theirs))
        near = self._nearest_cosine(head)
        text = f"{text} (scores differ by {slack:.1e}, nearest cosine {near:.1e})"
        # A clearly negative slack is no near-tie: something else, such as a protection, decided.
        if slack > -allowed and (slack < allowed or near < TOLERANCE):
            self.report.accepted.append(text)
            self.report.slack = max(self.report.slack, slack)
        else:
            self.report.mismatches.append(text)

    def _nearest_cosine(self, head: scores.HeadView) -> float:
        """Return how close a cosine is to the threshold above which keys count as similar."""
        if self.redundancy is not scores.key_cosine or not self.policy.mixer.uses_redundancy:
            return math.inf
        p: Any = self.policy.redundancy
        distance = (scores.cosines(p, head) - p.threshold).abs()
        return float(distance.min()) if distance.numel() else math.inf

    # -- attention outputs --------------------------------------------------------------------------------------------

    def _check_outputs(self, row: OracleRow, b: int, event: PassEvent, valid: list[bool]) -> None:
        """Recompute what the attention must return over the entries that are held."""
        for i in self.layers:
            output, info = event.layers[i].output, self.trace.layers[i]
            if output is None or not any(valid):
                continue
            for h in range(info.heads):
                view = self._head(row, i, h)
                position = row.seen - sum(valid)
                for column in (c for c, real in enumerate(valid) if real):
                    query = self._turned_queries(row.queries[i][position][None, h].double(), i, row)[0]
                    visible = [p <= position for p in view.positions]
                    for g, line in enumerate(scores.logits_of(query, view.keys, info)):
                        sink = None if view.sinks is None else float(view.sinks[g])
                        expected = scores.softmax_among(line, visible, sink) @ view.values
                        error = float((output[b, column, h * info.groups + g].double() - expected).abs().max())
                        self.report.output_error = max(self.report.output_error, error)
                    position += 1


def _name(component: Any) -> str:
    return catalog().name_of(type(component))


def compare(trace: Trace, policy: Policy, scorers: dict[str, scores.Scorer] | None = None) -> OracleReport:
    """Replay a trace under a policy and report where the recorded cache holds something else than the oracle says.

    Args:
        trace: of a `TracedCache`.
        policy: its policy.
        scorers: oracle scorers for components that are not bundled, by registered name.
    """
    return Oracle(trace, policy, scorers).run()
