"""Laws about what must not matter: the order of heads and rows, company, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.view import CacheView
from kvpolicy.testing.cases import Case
from kvpolicy.testing.laws._base import SEES_VIEW, decided, law
from kvpolicy.testing.laws._draws import case_and, cases, kind_of_subject, observed_by, one_case, order
from kvpolicy.testing.laws._outcome import expect_equivariant, expect_same, outcome

_UNMOVED = "the order stayed what it was"


def _pools_heads(subject: Any) -> str | None:
    if kind_of_subject(subject) == "policy" and subject.allocator.counts == "per_head":
        return "its allocator breaks ties between heads by their index"
    return None


@law(
    "A head has no number: a score that depends on it is computed from the wrong head (GQA layouts, broadcast slips).",
    SEES_VIEW,
    case_and(heads=order()),
    unless=_pools_heads,
)
def permuting_heads(subject: Any, case: Case, heads: tuple[int, ...]) -> None:
    """Permuting the KV heads, with their query heads, permutes the result."""
    chosen = [h for h in heads if h < case.heads]
    decided(chosen != sorted(chosen), _UNMOVED)
    expect_equivariant(
        subject, case, lambda c: c.with_heads(chosen), lambda t: t[:, chosen], f"with heads in order {chosen},"
    )


def _heads_decide_together(subject: Any) -> str | None:
    if kind_of_subject(subject) != "policy":
        return None
    if subject.selector.scope != "head" or subject.allocator.counts == "per_head":
        return "its heads decide together, and a runtime gathers them first"
    return None


@law(
    "Under tensor parallelism a rank holds some of the heads; by local numbers it draws and looks up those of others.",
    SEES_VIEW,
    case_and(first=st.integers(1, 2)),
    unless=_heads_decide_together,
)
def some_heads_alone(subject: Any, case: Case, first: int) -> None:
    """The last heads of a layer get in a view of their own, which says which heads they are, what they get with all."""
    total = case.heads
    decided(first < total, "all heads are there")
    span, last = HeadSpan(first, total - first, total), list(range(first, total))

    def alone(whole: Case) -> Case:
        return whole.with_heads(last).by_view(lambda view: replace(view, heads=span))

    expect_equivariant(subject, case, alone, lambda t: t[:, first:], f"with heads {last} of {total} alone,")


@law(
    "The rows of a batch are strangers; the released code of several papers scores the first row only.",
    (*SEES_VIEW, "allocator"),
    case_and(rows=order()),
)
def permuting_rows(subject: Any, case: Case, rows: tuple[int, ...]) -> None:
    """Permuting the rows of the batch permutes the result."""
    chosen = [b for b in rows if b < case.rows]
    decided(chosen != sorted(chosen), _UNMOVED)
    expect_equivariant(
        subject, case, lambda c: c.with_rows(chosen), lambda t: t[chosen], f"with rows in order {chosen},"
    )


@law(
    "A result must not depend on who else is in the batch, or no experiment can be repeated at another batch size.",
    (*SEES_VIEW, "allocator"),
    one_case,
)
def row_alone(subject: Any, case: Case) -> None:
    """A row in a batch gets what it gets alone, without the padding that only the others need."""
    padded = any(not bool(v.flatten(0, 1).any(0).all()) for v in case.valid)
    decided(case.rows > 1 or padded, "one row without padding")
    together = outcome(subject, case)
    for b in range(case.rows):
        row = case.with_rows([b])
        alone = row.without_padding()
        slots = torch.stack([v.flatten(0, 1).any(0) for v in row.valid]).any(0)
        expected = [t[b : b + 1] if t.dim() == 2 else t[b : b + 1, :, slots] for t in together]
        expect_same(subject, row, expected, outcome(subject, alone), alone.valid, f"alone, at row {b} of the batch,")


@law(
    "Batches of prompts are padded on the left; whoever counts slots instead of tokens moves every window.",
    (*SEES_VIEW, "allocator"),
    case_and(left=st.integers(0, 4), right=st.integers(0, 4)),
)
def left_padding(subject: Any, case: Case, left: int, right: int) -> None:
    """Padding before the tokens (and free slots behind them) changes nothing."""
    decided(left or right, "no padding")

    def moved(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 2:
            return t
        before, behind = (t.new_zeros(*t.shape[:2], count, *t.shape[3:]) for count in (left, right))
        return torch.cat([before, t, behind], dim=2)

    expect_equivariant(
        subject, case, lambda c: c.with_padding(left, right), moved, f"with {left} pads before and {right} behind,"
    )


def _not_the_same(subject: Any) -> str | None:
    return None if all(c.same_for_layers for c in subject.members()) else "it does not promise `same_for_layers`"


@law(
    "Layers that lie in one arena are scored as one view with more rows, under the index of the first.",
    ("importance", "redundancy", "mixer", "protection"),
    case_and(shift=st.integers(1, 2)),
    unless=_not_the_same,
    effort=0.5,
)
def layer_ignored(subject: Any, case: Case, shift: int) -> None:
    """With `same_for_layers` another layer index changes nothing."""
    other = case.by_view(lambda v: replace(v, layer_idx=(v.layer_idx + shift) % v.num_layers))
    expect_equivariant(subject, case, lambda _case: other, lambda t: t, f"{shift} layers further,")


def _sees_no_queries(subject: Any) -> str | None:
    return None if observed_by(subject) else "it looks at no queries"


@law(
    "A score belongs to an entry, not to the slot that it lies in; it must move when the entry moves.",
    ("importance",),
    case_and(first=st.integers(0, 15), second=st.integers(0, 15)),
)
def permuting_entries(subject: Any, case: Case, first: int, second: int) -> None:
    """Exchanging the contents of two slots (keys, values, state; not positions) exchanges their scores.

    Only slots older than the observed queries are exchanged. Scorers that look at positions or at neighbours declare
    that the law does not apply to them.
    """
    case = case.with_rows([0])
    view = case.view
    old = view.positions < view.seen[:, None, None] - max(1, observed_by(subject))
    free = (view.valid & old).all(0).all(0).nonzero()[:, 0].tolist()
    decided(len(free) > 1, "fewer than two old entries")
    a = free[first % len(free)]
    b = free[(free.index(a) + 1 + second % (len(free) - 1)) % len(free)]
    index = torch.arange(view.shape[2])
    index[a], index[b] = b, a

    def exchanged(c: Case) -> Case:
        return c.at_slots(index).by_view(
            lambda new: replace(new, positions=view.positions, rope_positions=view.rope_positions)
        )

    expect_equivariant(
        subject, case, exchanged, lambda t: t[:, :, index], f"with slots {a} and {b} in each other's places,"
    )


@law(
    "Queries are kept as they came or in a ring; their positions say which is which.",
    ("importance", "redundancy", "policy"),
    case_and(columns=order(5)),
    unless=_sees_no_queries,
)
def query_order_ignored(subject: Any, case: Case, columns: tuple[int, ...]) -> None:
    """The order in which the observed queries stand in the view changes nothing."""
    view = case.view
    assert view.query_positions is not None
    count = view.query_positions.shape[1]
    chosen = [i for i in columns if i < count] + list(range(len(columns), count))
    decided(chosen != sorted(chosen), _UNMOVED)

    def turned(v: CacheView) -> CacheView:
        if v.queries is None or v.query_positions is None or v.query_valid is None:
            return v
        positions, valid = v.query_positions[:, chosen], v.query_valid[:, chosen]
        return replace(v, queries=v.queries[:, :, :, chosen], query_positions=positions, query_valid=valid)

    what = f"with the queries in order {chosen},"
    expect_equivariant(subject, case, lambda c: c.by_view(turned), lambda t: t, what)


@law(
    "The parts of a policy share one log of queries, which is as long as the longest window that any of them asks for.",
    ("importance", "redundancy"),
    lambda subject: st.fixed_dictionaries({"case": cases(subject, observe=2 * observed_by(subject) + 4)}),
    unless=_sees_no_queries,
)
def older_queries_ignored(subject: Any, case: Case) -> None:
    """Queries before the last `observed_queries()` of a row, for which another part may have asked, change nothing."""
    view = case.view
    assert view.query_positions is not None
    assert view.query_valid is not None
    newest = view.query_positions.masked_fill(~view.query_valid, -1).amax(-1, keepdim=True)
    asked = view.query_valid & (view.query_positions > newest - observed_by(subject))
    decided(bool((view.query_valid & ~asked).any()), "no query is older than what it asks for")

    def cut(v: CacheView) -> CacheView:
        if v.queries is None or v.query_positions is None:
            return v
        queries = v.queries.masked_fill(~asked[:, None, None, :, None], float("nan"))
        positions = v.query_positions.masked_fill(~asked, torch.iinfo(torch.int32).max)
        return replace(v, queries=queries, query_positions=positions, query_valid=asked)

    what = f"without the queries before the last {observed_by(subject)},"
    expect_equivariant(subject, case, lambda c: c.by_view(cut), lambda t: t, what)
