"""What a runtime must know of a policy before it starts; see `Policy.traits`."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.contracts.slot_state import SlotState


@dataclass(frozen=True)
class Traits:
    """Computed from a policy's components. A runtime that cannot serve a trait refuses by its name.

    Attributes:
        equal_counts: after a compaction every head of every layer holds as many entries as the others.
        length_is_counted: how many that are follows from the row's counters alone, so that nobody has to ask the
            device: a budget of counts, equal counts, a selector that keeps them exactly, and no protection that drops
            entries.
        needs: what the components need from the runtime, names out of `NEEDS`.
        state: slot state that moves with the entries.
        re_rotates: kept keys get other positions, and so do new keys and queries.
        whole_prompt: the prompt must come in one forward pass.
    """

    equal_counts: bool
    length_is_counted: bool
    needs: frozenset[str]
    state: tuple[SlotState, ...]
    re_rotates: bool
    whole_prompt: bool
