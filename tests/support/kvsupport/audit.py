"""What holds under every policy: exact counts, no resurrection, exact attention over what is held."""

from __future__ import annotations

from typing import Any

from kvpolicy.policy.policy import Policy
from kvsupport.events import PassEvent, Trace
from kvsupport.oracle import Oracle
from kvsupport.oracle_rows import OracleReport, OracleRow, Sets


class _Auditor(Oracle):
    """An oracle that takes the cache's decisions as they are and checks what follows from them."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        self.trace = trace
        self.policy = policy
        self.rerotates = False
        self.rows: list[OracleRow] = []
        self.layers = sorted(trace.layers)
        self.prefill = True
        self.report = OracleReport()

    def _compact_if_due(self, row: OracleRow, incoming: int, recorded: dict[int, Sets], where: str) -> None:
        if recorded == row.held:
            return
        before = total = 0
        for i in self.layers:
            for h, (old, new) in enumerate(zip(row.held[i], recorded[i], strict=True)):
                self.report.decisions += 1
                self.report.evictions += len(old) - len(new)
                before, total = before + len(old), total + len(new)
                if new != sorted(set(new)) or not set(new) <= set(old):
                    self.report.mismatches.append(f"{where}, layer {i}, head {h}: keeps {new} of {old}")
        heads = sum(len(sets) for sets in recorded.values())
        expected = min(self._entries(row) * heads, before)
        if total > expected or (total != expected and self.policy.selector.exact):
            self.report.mismatches.append(f"{where}: {total} entries are kept over all heads, {expected} expected")
        self._adopt(row, recorded)

    def _check_outputs(self, row: OracleRow, b: int, event: PassEvent, valid: list[bool]) -> None:
        """Only where entries are as they came: nothing else is known of them here."""
        if not self.policy.post:
            super()._check_outputs(row, b, event, valid)

    def _entries(self, row: OracleRow) -> int:
        return self.policy.entries(row.seen, row.prompt)

    def _retention(self, head: Any) -> Any:
        raise AssertionError("an audit scores nothing")


def audit(trace: Trace, policy: Policy) -> OracleReport:
    """Check a trace under any policy; the attention only where no post-operation changes entries.

    Args:
        trace: of a `TracedCache` with `outputs=True`, to have the attention recomputed.
        policy: its policy; its budget and its rounding are used, nothing that it decides.

    Returns:
        A report without accepted differences: a compaction that keeps what was not there, or not exactly the budget
        over all heads and layers, is a mismatch; `output_error` compares the attention with float64 loops.
    """
    return _Auditor(trace, policy).run()
