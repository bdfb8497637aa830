"""The armed check (KVPOLICY_VLLM_CHECK=1): before every step, all that attention will read is looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.store.protocol import Rows
from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.vllm.session import Reading, Session


def check_step(session: Session, reading: Reading, table: Tensor) -> None:
    """Look at every request of a step whose tokens have their places, and are not stored yet.

    Args:
        session: the worker's.
        reading: what attention will be told.
        table: vLLM's own block table, `[rows, blocks]`, in the order of the batch.

    Raises:
        CacheStateError: an entry cannot be reached through vLLM's block table, a null or freed block would be read, a
            block has two owners, counters of ledger, store and vLLM disagree, or what is held is not what it says.
    """
    cache, packed = session.cache, reading.packed
    tables, ledger = cache.store.tables, cache.ledger
    rows = table.tolist()
    for i, row in enumerate(packed.rows):
        own, first = tables[row], reading.skipped[i]
        live = own.live
        if rows[i][first : first + len(live)] != live or own.first % own.block:
            raise _fault(row, f"vLLM reads blocks {rows[i][first : first + len(live)]}, and its entries are in {live}")
        if not ledger.resident(row) == own.length == reading.lengths[i]:
            raise _fault(row, f"{ledger.resident(row)} entries were counted, {own.length} are held")
        if ledger.position(row) != own.end + own.shift or ledger.position(row) < packed.before[i]:
            raise _fault(row, f"{ledger.position(row)} tokens were counted, {own.end + own.shift} were placed")
    owners: dict[int, object] = {}
    for row in tables:
        for block in (each for each in tables[row].blocks if each is not None):
            if block in owners or not 0 < block < tables.blocks:
                raise _fault(
                    row, f"block {block} is also that of {owners.get(block, 'nobody, it is the null block')!r}"
                )
            owners[block] = row
    for i, row in enumerate(packed.rows):
        _check_entries(session, row, packed.before[i])


def _check_entries(session: Session, row: object, before: int) -> None:
    """Every head's positions ascend, those of this step last and in full, and what is held from before is finite."""
    cache = session.cache
    length = cache.ledger.resident(row)
    new = cache.ledger.position(row) - before
    for layer in cache.layers:
        held = cache.store.read(layer, Rows.of([row], [length]))
        at = held.positions[0]
        ends = torch.arange(before, before + new, device=at.device)
        if not bool((at.diff(dim=-1) > 0).all()) or not bool((at[:, length - new :] == ends).all()):
            raise _fault(row, f"layer {layer} holds positions {at[0].tolist()[-8:]} at its end")
        old = held.keys[0, :, : length - new], held.values[0, :, : length - new]
        if not all(bool(each.isfinite().all()) for each in old):
            raise _fault(row, f"layer {layer} holds keys or values that are not finite")


def _fault(row: object, what: str) -> CacheStateError:
    return CacheStateError(
        f"request {row!r}: {what}; this is a fault of kvpolicy, or of a version that it does not know."
    )
