"""Laws about a policy in the engine, over prompts and decode steps with synthetic keys, values and queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kvpolicy.cache.engine import Engine
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.policy import Policy
from kvpolicy.testing.cases import Case, Layer
from kvpolicy.testing.laws._base import UndecidedError, broken, decided, law
from kvpolicy.testing.laws._drive import Drive, Held, Text, difference
from kvpolicy.testing.laws._outcome import rounding_decides
from kvpolicy.testing.scaling import protected

_EFFORT = 0.4  # an engine run is some twenty forward passes
_TOO_FEW = "too few compactions"


@st.composite
def _batch(draw: DrawFn, _policy: Any) -> dict[str, Any]:
    prompts = draw(st.lists(st.integers(1, 20), min_size=2, max_size=3))
    seed = draw(st.integers(0, 99))
    return {"prompts": tuple(prompts), "seed": seed, "steps": draw(st.integers(0, 6) | st.integers(20, 28))}


def _texts(prompts: tuple[int, ...], seed: int) -> list[Text]:
    return [Text(seed + b) for b in range(len(prompts))]


def _roomy(policy: Policy, prompts: tuple[int, ...]) -> Policy:
    """Return the policy with a budget that holds what it protects of these prompts, and a few entries more."""
    tokens = policy.budget.tokens
    if tokens is None:
        return policy
    return replace(
        policy, budget=policy.budget.model_copy(update={"tokens": max(tokens, protected(policy, max(prompts)) + 2)})
    )


def evicts(policy: Policy) -> bool:
    """Whether the policy ever evicts anything."""
    return policy.budget.fraction != 1.0


def _never_evicts(policy: Policy) -> str | None:
    return None if evicts(policy) else "it never evicts"


def _finished(policy: Policy, texts: list[Text], prompts: tuple[int, ...], steps: int, jitter: float = 0.0) -> Drive:
    drive = Drive(policy, texts, jitter)
    drive.run(prompts, steps)
    drive.settle()
    return drive


def _expect(expected: list[Held], got: list[Held], what: str, again: Any) -> None:
    """Compare; `again(jitter)` repeats the expected run to see whether rounding decides."""
    found = difference(expected, got)
    if found is None:
        return
    for size in (1e-6, 2e-6, 4e-6):
        if [list(h) for h in again(size)] != [list(h) for h in expected]:
            raise UndecidedError("rounding decides")
    raise broken(f"{what} {found}.")


@law(
    "Batching must not change an experiment: left padding, other lengths and other rows' compactions are not a row's "
    "business.",
    ("policy",),
    _batch,
    effort=0.6,
)
def engine_row_alone(subject: Policy, prompts: tuple[int, ...], seed: int, steps: int) -> None:
    """After a left-padded batch of prompts and decode steps a row holds what it holds alone: positions, keys, state."""
    policy, texts = _roomy(subject, prompts), _texts(prompts, seed)
    batch = _finished(policy, texts, prompts, steps)
    decided(batch.compactions or not evicts(policy), _TOO_FEW)
    for b, prompt in enumerate(prompts):

        def alone(jitter: float, b: int = b, prompt: int = prompt) -> list[Held]:
            return _finished(policy, [texts[b]], (prompt,), steps, jitter).held(0)

        _expect(alone(0.0), batch.held(b), f"row {b} of the batch:", alone)


@law(
    "A cache that is used twice must not remember; stale lengths and scores were bugs of three released codes.",
    ("policy",),
    _batch,
    effort=_EFFORT,
)
def reset_is_new(subject: Policy, prompts: tuple[int, ...], seed: int, steps: int) -> None:
    """After `reset` a cache does with the next sequence what a new one does."""
    policy = _roomy(subject, (*prompts, 9))
    used = Drive(policy, [Text(seed + 500 + b) for b in range(2)])
    used.run((9, 5), 6)
    used.engine.reset()
    used.start(_texts(prompts, seed))
    used.run(prompts, steps)
    used.settle()

    def new(jitter: float) -> Drive:
        return _finished(policy, _texts(prompts, seed), prompts, steps, jitter)

    fresh = new(0.0)
    decided(fresh.compactions or not evicts(policy), _TOO_FEW)
    for b in range(len(prompts)):
        _expect(fresh.held(b), used.held(b), f"row {b} after a reset:", lambda j, b=b: new(j).held(b))


@law(
    "What is evicted has left memory; an entry that comes back is a stale slot that was read.",
    ("policy",),
    _batch,
    unless=_never_evicts,
    effort=_EFFORT,
)
def evicted_stays_evicted(subject: Policy, prompts: tuple[int, ...], seed: int, steps: int) -> None:
    """Through all compactions a head holds only what it held before and what came since, and no entry twice."""
    policy = _roomy(subject, prompts)
    drive = Drive(policy, _texts(prompts, seed))
    drive.run(prompts, 0)
    before = [_positions(drive, b) for b in range(len(prompts))]
    for _ in range(steps):
        drive.forward([1] * len(prompts), prefill=False)
        for b, row in enumerate(drive.engine.rows):
            now = _positions(drive, b)
            for place, (old, new) in enumerate(zip(before[b], now, strict=True)):
                back = set(new) - set(old) - {row.seen - 1}
                if back:
                    raise broken(f"row {b}, head {place}: position {min(back)} is back after it had been evicted.")
                counted = policy.counts != "equal" or len(new) == row.resident
                if row.seen - 1 not in new or not counted or new != sorted(set(new)):
                    raise broken(f"row {b}, head {place}: holds {new} at {row.seen} tokens, {row.resident} resident.")
            before[b] = now
    # A prompt is compacted once, or once per chunk; while decoding what one compaction evicts, the next may bring back.
    decided(drive.compactions >= (1 if policy.phase == "prefill" else 2), _TOO_FEW)


def _positions(drive: Drive, row: int) -> list[list[int]]:
    return [list(held) for held in drive.held(row)]


@law(
    "A bound on memory is what eviction is for; one that is exceeded is an out-of-memory later.",
    ("policy",),
    _batch,
    unless=_never_evicts,
    effort=_EFFORT,
)
def residents_are_bounded(subject: Policy, prompts: tuple[int, ...], seed: int, steps: int) -> None:
    """While decoding no head holds more than `Policy.bound`, and after a compaction none more than the budget."""
    policy = _roomy(subject, prompts)
    drive = Drive(policy, _texts(prompts, seed))
    drive.run(prompts, 0)
    compactions = [row.compactions for row in drive.engine.rows]  # a prompt in chunks has had some
    for step in range(steps):
        drive.forward([1] * len(prompts), prefill=False)
        for b, row in enumerate(drive.engine.rows):
            entries = policy.entries(row.seen - 1, row.prompt)
            if row.compactions > compactions[b] and row.resident > entries + 1:
                raise broken(f"row {b}: {row.resident - 1} entries after a compaction to {entries}.")
            compactions[b] = row.compactions
            # The first decode step may still find a long prompt that nothing was allowed to compact.
            if policy.bound is not None and step > 0 and row.compactions and row.resident > policy.bound:
                raise broken(f"row {b}: {row.resident} entries, and the policy's bound is {policy.bound}.")
    decided(any(compactions), _TOO_FEW)


def _compresses_prompts(policy: Policy) -> str | None:
    return None if policy.phase == "decode" else "it compresses the prompt, so the chunks are part of the method"


@law(
    "How a prompt is cut into chunks is the runtime's business.",
    ("policy",),
    _batch,
    unless=_compresses_prompts,
    effort=_EFFORT,
)
def chunks_do_not_matter(subject: Policy, prompts: tuple[int, ...], seed: int, steps: int) -> None:
    """With phase `decode` a prompt read in chunks of three leaves what a prompt read at once leaves."""
    policy, texts = _roomy(subject, prompts), _texts(prompts, seed)

    def whole(jitter: float) -> Drive:
        return _finished(policy, texts, prompts, steps, jitter)

    chunked = Drive(policy, texts)
    chunked.run(prompts, steps, chunk=3)
    chunked.settle()
    at_once = whole(0.0)
    decided(at_once.compactions or not evicts(policy), _TOO_FEW)
    for b in range(len(prompts)):
        what = f"row {b} with its prompt in chunks:"
        _expect(at_once.held(b), chunked.held(b), what, lambda j, b=b: whole(j).held(b))


@law(
    "A decision that is carried out on another row, head or layer is no decision.",
    ("policy",),
    _batch,
    unless=_never_evicts,
    effort=_EFFORT,
)
def choice_is_carried_out(subject: Policy, prompts: tuple[int, ...], seed: int, steps: int) -> None:
    """After a compaction each head holds just the entries that `Policy.select` chose from what it held before."""
    policy = _roomy(subject, prompts)
    drive = Drive(policy, _texts(prompts, seed))
    drive.run(prompts, 0)
    looked = 0
    for _ in range(steps):
        drive.engine.observe()
        rows = [slice(b, b + 1) for b in range(len(prompts))]
        before = [_copied(drive.engine, part, policy) for part in rows]
        counted = [row.compactions for row in drive.engine.rows]
        drive.engine.settle()
        for b, row in enumerate(drive.engine.rows):
            if row.compactions == counted[b]:
                continue
            budget = policy.entries(row.seen, row.prompt)
            chosen = policy.select(before[b], [budget])
            wanted = [
                view.positions[0, h, kept.indices[0, h, : int(kept.lengths[0, h])]].tolist()
                for view, kept in zip(before[b], chosen, strict=True)
                for h in range(view.shape[1])
            ]
            now = _positions(drive, b)
            looked += 1
            if now != wanted:
                if rounding_decides(policy, Case(tuple(Layer(v) for v in before[b]), budget=(budget,))):
                    raise UndecidedError("rounding decides")
                place = next(i for i, (x, y) in enumerate(zip(now, wanted, strict=True)) if x != y)
                raise broken(f"row {b}, head {place}: holds positions {now[place]}, chosen were {wanted[place]}.")
        drive.forward([1] * len(prompts), prefill=False)
    decided(looked, _TOO_FEW)


def _copied(engine: Engine, part: slice, policy: Policy) -> list[CacheView]:
    """Return the views of all layers, as a compaction would see them, on memory of their own."""
    budget = [policy.entries(row.seen, row.prompt) for row in engine.rows[part]]
    views = [engine.view(layer, part, engine.log.window(), budget) for layer in engine.layers]
    return [Case((Layer(v),)).by_slot(lambda x, _valid: x.clone()).view for v in views]
