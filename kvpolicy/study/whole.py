"""Whether a cell may be graded: with `strict`, only one that is whole, even and of one making."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from kvpolicy.study.records import CellRecord, RunRecord


def refusal(cell: CellRecord, records: Sequence[RunRecord]) -> str | None:
    """Return why the numbers of a cell would mislead, in words; None if they may be taken.

    Args:
        cell: a variant in a place, with the keys of the runs that the study asks for.
        records: those of its runs that are recorded, failed ones too.
    """
    if cell.error is not None:
        return None  # which says why there are no numbers
    asked, failed = len(cell.keys), sum(record.error is not None for record in records)
    if len(records) < asked or not asked:
        return f"it is incomplete: {asked - len(records):,} of {asked:,} runs are missing"
    if failed:
        return f"it is incomplete: {failed:,} of {asked:,} runs failed"
    return _ragged(records) or _mixed(records)


def _ragged(records: Sequence[RunRecord]) -> str | None:
    of_kind: dict[str, Counter[int]] = defaultdict(Counter)
    for record in records:
        of_kind[record.kind][record.problem] += 1
    counts = {count for problems in of_kind.values() for count in problems.values()}
    if len(counts) > 1:
        return f"it is ragged: its problems have between {min(counts)} and {max(counts)} runs each"
    if len({frozenset(problems) for problems in of_kind.values()}) > 1:
        return "it is ragged: not every problem that was answered was read under teacher forcing too"
    return None


def _mixed(records: Sequence[RunRecord]) -> str | None:
    makings = len({record.environment for record in records})
    if makings == 1:
        return None
    return f"it is mixed: its runs were made with {makings} different sets of versions or kinds of machine"
