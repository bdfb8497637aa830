"""Laws of one kind each: redundancy, mixers, allocators, protections, triggers, post-operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from kvpolicy.contracts.components import Counters
from kvpolicy.contracts.view import CacheView
from kvpolicy.testing.cases import Case, keep_indices
from kvpolicy.testing.laws._base import broken, decided, law
from kvpolicy.testing.laws._draws import case_and, cases, one_case
from kvpolicy.testing.laws._outcome import allocation_request, expect_same, outcome, replaced
from kvpolicy.testing.tensors import codes


@st.composite
def _twins(draw: DrawFn, subject: Any) -> dict[str, Any]:
    case = draw(cases(subject, still_rope=True))
    copies = draw(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=4))

    def copied(x: Tensor) -> Tensor:
        slots = x.shape[2]
        index = torch.arange(slots)
        for old, new in copies:
            index[new % slots] = index[old % slots]
        return x[:, :, index]

    view = case.view

    def spoilt(x: Tensor) -> Tensor:
        return torch.where(view.valid.unsqueeze(-1), torch.nan_to_num(copied(x)), float("nan"))

    def twinned(v: CacheView) -> CacheView:
        extras = {n: copied(t) & v.valid if n == "modality" else t for n, t in v.extras.items()}
        return replace(v, keys=spoilt(v.keys), values=spoilt(v.values), extras=extras)

    return {"case": case.by_view(twinned)}


@law("Of copies one must stay, and the newest is the one that the model is about to use.", ("redundancy",), _twins)
def newest_twin_spared(subject: Any, case: Case) -> None:
    """Of two entries with equal keys and values the newer one is never more redundant than the older one.

    Where text and image tokens are told apart, of two of one sort.
    """
    view = case.view
    alike = [view.keys, view.values, *(t.unsqueeze(-1) for n, t in view.extras.items() if n == "modality")]
    score = outcome(subject, case)[0]
    twins = 0
    for b in range(case.rows):
        for h in range(case.heads):
            slots = view.valid[b, h].nonzero()[:, 0].tolist()
            for i, old in enumerate(slots):
                for new in slots[i + 1 :]:
                    if not all(torch.equal(x[b, h, old], x[b, h, new]) for x in alike):
                        continue
                    twins += 1
                    if score[b, h, new] > score[b, h, old] + 1e-5 * (1 + score[b, h, old].abs()):
                        raise broken(
                            f"row {b}, head {h}: slots {old} and {new} hold the same key and value, with redundancy "
                            f"{score[b, h, old].item()} and {score[b, h, new].item()}; the newer one is to be spared."
                        )
    decided(twins, "no two equal keys")


def _no_weight(mixer: Any) -> str | None:
    return None if "weight" in type(mixer).model_fields else "it has no parameter `weight`"


@law(
    "The two ends of the knob are the two ablations; a swapped or shifted weight shows there.",
    ("mixer",),
    one_case,
    unless=_no_weight,
)
def weight_limits(subject: Any, case: Case) -> None:
    """Weight 1 ranks by importance alone, weight 0 by redundancy alone, the least redundant first."""
    aligned = case.layers[0].aligned
    pairs = 0
    for weight, reference in ((1.0, aligned["importance"]), (0.0, -aligned["redundancy"])):
        got = outcome(type(subject)(**{**dict(subject), "weight": weight}), case)[0]
        for b in range(case.rows):
            for h in range(case.heads):
                slots = case.view.valid[b, h].nonzero()[:, 0].tolist()
                for m in slots:
                    for n in slots:
                        below = bool(reference[b, h, m] < reference[b, h, n])
                        pairs += below
                        if below and not got[b, h, m] < got[b, h, n]:
                            name = "importance" if weight else "redundancy"
                            raise broken(
                                f"weight {weight}, row {b}, head {h}: slots {m} and {n} are not ranked by {name} alone."
                            )
    decided(pairs, "all scores are equal")


def _uses_both(mixer: Any) -> str | None:
    return "it uses both" if mixer.uses_importance and mixer.uses_redundancy else None


@law(
    "A policy skips the scorer that a mixer says it does not use.",
    ("mixer",),
    case_and(number=st.integers(-3, 3)),
    unless=_uses_both,
)
def declared_use_is_true(subject: Any, case: Case, number: int) -> None:
    """What `uses_importance` or `uses_redundancy` denies has no influence."""
    expected = outcome(subject, case)
    layer = case.layers[0]
    for name in ("importance", "redundancy"):
        if getattr(subject, f"uses_{name}"):
            continue
        other = Case((type(layer)(layer.view, {**layer.aligned, name: torch.full_like(layer.aligned[name], number)}),))
        what = f"with {number} for every {name}, which it says it does not use,"
        expect_same(subject, case, expected, outcome(subject, other), case.valid, what, exact=True)


@law(
    "A budget that is not met exactly makes every comparison unfair; PyramidKV's code keeps 5 % too many.",
    ("allocator",),
    one_case,
)
def exact_total(subject: Any, case: Case) -> None:
    """int64 counts, at least what is protected and at most what is there, that add up to the budget in each row."""
    request = allocation_request(case)
    counts = list(subject.allocate(request))
    if len(counts) != len(request.valid):
        raise broken(f"returned {len(counts)} tensors for {len(request.valid)} layers.")
    for i, (got, valid, protected) in enumerate(zip(counts, request.valid, request.protected, strict=True)):
        if got.dtype != torch.int64 or got.shape != valid.shape:
            raise broken(f"layer {i}: {got.dtype} {list(got.shape)} instead of torch.int64 {list(valid.shape)}.")
        for name, wrong in (("more than are valid", got > valid), ("fewer than are protected", got < protected)):
            if bool(wrong.any()):
                b, h = wrong.nonzero()[0].tolist()
                raise broken(f"layer {i}, row {b}, head {h}: {int(got[b, h])} entries are {name}.")
    for b, budget in enumerate(case.budget):
        there = sum(int(v[b].sum()) for v in request.valid)
        want = min(budget * len(counts) * case.heads, there)
        total = sum(int(c[b].sum()) for c in counts)
        if total != want:
            raise broken(f"row {b}: the counts add up to {total} instead of {want}.")


def _declares_nothing(allocator: Any) -> str | None:
    return "it says that every head may get its own count" if allocator.counts == "per_head" else None


@law(
    "`counts` and `scope` of a policy are checked against what an allocator declares.",
    ("allocator",),
    one_case,
    unless=_declares_nothing,
)
def declared_shares_are_true(subject: Any, case: Case) -> None:
    """``equal`` gives all heads and layers the same, ``per_layer`` all heads of a layer."""
    decided(case.heads > 1 or len(case.layers) > 1, "one head in one layer")
    counts = outcome(subject, case)
    for i, got in enumerate(counts):
        if subject.counts != "per_head" and bool((got != got[:, :1]).any()):
            raise broken(f"layer {i}: heads get {got.tolist()}, and it declares counts = {subject.counts!r}.")
        if subject.counts == "equal" and bool((got != counts[0]).any()):
            raise broken(f"layer {i} gets {got.tolist()}, layer 0 {counts[0].tolist()}, and it declares equal counts.")


@law("Masks are combined with those of other components.", ("protection",), one_case)
def mask_is_bool(subject: Any, case: Case) -> None:
    """The mask is bool `[B, H, N]`, and no slot without a token is said to stay.

    With `only_padding` none with a token is said to go.
    """
    got = outcome(subject, case)[0]
    if got.dtype != torch.bool or got.shape != case.view.shape:
        raise broken(f"returned {got.dtype} {list(got.shape)} instead of torch.bool {list(case.view.shape)}.")
    wrong = got & ~case.view.valid
    if subject.effect == "keep" and bool(wrong.any()):
        b, h, n = wrong.nonzero()[0].tolist()
        raise broken(f"row {b}, head {h}: slot {n} is not valid and is to stay.")
    gone = got & case.view.valid
    if subject.effect == "drop" and subject.only_padding and bool(gone.any()):
        b, h, n = gone.nonzero()[0].tolist()
        raise broken(f"row {b}, head {h}: slot {n} holds a token and is to go, and it declares `only_padding`.")


def _drops(protection: Any) -> str | None:
    return "what it marks must go" if protection.effect == "drop" else None


@law(
    "A policy is refused when its budget is below what it protects, so the number must be right.",
    ("protection",),
    one_case,
    unless=_drops,
)
def reserved_is_true(subject: Any, case: Case) -> None:
    """No head keeps more than `reserved` says for the row's prompt.

    In a long row of which nothing has been evicted each keeps just that many. With `same_for_heads` heads that hold the
    same positions keep the same ones.
    """
    if subject.same_for_heads:
        alike = subject.mask(_first_head_everywhere(case.view))
        if bool((alike != alike[:, :1]).any()):
            raise broken("heads that hold the same positions keep other ones, and it declares `same_for_heads`.")
    got = outcome(subject, case)[0].sum(-1)
    for b, (kept, prompt) in enumerate(zip(got.amax(-1).tolist(), case.view.prompt_length.tolist(), strict=True)):
        if kept > subject.reserved(prompt):
            raise broken(f"row {b}: {kept} entries stay, and reserved({prompt}) says {subject.reserved(prompt)}.")
    prompts = case.view.prompt_length.tolist()
    longest = max(subject.reserved(prompt) for prompt in prompts) + 8
    whole = _long_row(case.view, longest)
    for b, (kept, prompt) in enumerate(zip(subject.mask(whole).sum(-1).tolist(), prompts, strict=True)):
        if kept != [subject.reserved(prompt)] * len(kept):
            raise broken(
                f"row {b}: {kept} entries stay of {longest}, and reserved({prompt}) says {subject.reserved(prompt)}."
            )


def _first_head_everywhere(view: CacheView) -> CacheView:
    """Return the view with the first head's positions and holes in all heads; keys and values are as they were."""
    positions, valid = (x[:, :1].expand(view.shape).clone() for x in (view.positions, view.valid))
    return replace(view, positions=positions, valid=valid)


def _long_row(view: CacheView, length: int) -> CacheView:
    """Return a view of rows that hold all of so many tokens."""
    shape = (*view.shape[:2], length)
    return CacheView(
        keys=torch.ones(*shape, view.keys.shape[3]),
        values=torch.ones(*shape, view.values.shape[3]),
        positions=torch.arange(length, dtype=torch.int32).expand(shape),
        valid=torch.ones(shape, dtype=torch.bool),
        scale=view.scale,
        layer_idx=view.layer_idx,
        num_layers=view.num_layers,
        prompt_length=view.prompt_length,
        seen=torch.full_like(view.seen, length),
        compaction=torch.zeros_like(view.compaction),
        state={name: torch.zeros(shape, dtype=t.dtype) for name, t in view.state.items()},
        rope=view.rope,
        rope_positions=None if view.rope_positions is None else torch.arange(length, dtype=torch.int32).expand(shape),
        queries=view.queries,
        query_positions=view.query_positions,
        query_valid=view.query_valid,
        budget=view.budget,
        extras={n: torch.zeros(shape, dtype=t.dtype) if n == "modality" else t for n, t in view.extras.items()},
    )


@law(
    "What is promised to stay is promised for good, not until the next compaction.",
    ("protection",),
    lambda subject: st.fixed_dictionaries({"case": cases(subject, ragged=False), "drops": codes(16)}),
    unless=_drops,
)
def protection_lasts(subject: Any, case: Case, drops: list[int]) -> None:
    """Protected entries are the same ones after a compaction that evicted others."""
    mask = outcome(subject, case)[0] & case.view.valid
    dropped = torch.tensor(drops[: case.view.shape[2]]) % 2 == 1
    dropped &= ~mask.any(0).any(0)
    # The newest entry is never evicted by anything but its score; keep it so that the row still ends where it did.
    dropped &= ~case.view.newest(1).any(0).any(0)
    stay = (~dropped).nonzero()[:, 0]
    after = case.at_slots(stay)
    got = outcome(subject, after)[0] & after.view.valid
    expect_same(subject, case, [mask[:, :, stay]], [got], after.valid, "after a compaction,", exact=True)
    decided(bool(mask.any()) and bool(dropped.any()), "nothing is protected, or nothing else evicted")


_COUNTERS = st.builds(
    Counters,
    resident=st.integers(0, 24),
    budget=st.integers(1, 16),
    incoming=st.integers(1, 8),
    seen=st.integers(0, 64),
    prompt=st.integers(0, 16),
)


@law(
    "A trigger that counts calls drifts with the batch, with retries and with the sequence before.",
    ("trigger",),
    lambda _subject: st.fixed_dictionaries(
        {"counters": _COUNTERS, "others": st.lists(_COUNTERS, min_size=1, max_size=12)}
    ),
)
def trigger_is_pure(subject: Any, counters: Counters, others: list[Counters]) -> None:
    """The answer follows from the counters alone, however often and with whatever the trigger was asked before."""
    expected = subject.fires(counters)
    if not isinstance(expected, bool):
        raise broken(f"fires() returned {type(expected).__name__} instead of bool.")
    for other in others:
        subject.fires(other)
    if subject.fires(counters) != expected or subject.model_copy().fires(counters) != expected:
        raise broken(
            f"fires({counters}) is {expected} at first and {not expected} after {len(others)} other questions."
        )


@law(
    "The buffer is what memory is reserved for.",
    ("trigger",),
    lambda _subject: st.fixed_dictionaries(
        {"budget": st.integers(1, 12), "resident": st.integers(0, 12), "seen": st.integers(0, 20)}
    ),
)
def buffer_is_kept(subject: Any, budget: int, resident: int, seen: int) -> None:
    """While decoding no row ever holds more than the budget plus `buffer()`, and at the budget nothing fires."""
    buffer = subject.buffer()
    if buffer < 1:
        raise broken(f"buffer() is {buffer} instead of at least 1.")
    resident = min(resident, budget)
    seen += resident
    for _ in range(3 * (buffer + 3)):
        if subject.fires(Counters(resident, budget, 1, seen, 0)):
            if resident <= budget:
                raise broken(f"fires with {resident} entries and a budget of {budget}: there is nothing to evict.")
            resident = budget
        resident, seen = resident + 1, seen + 1
        if resident > budget + buffer:
            raise broken(f"{resident} entries stand at {seen} tokens; budget {budget} and buffer {buffer} are fewer.")


@law("What it replaces is gathered like keys and values.", ("post",), one_case)
def replacements_fit(subject: Any, case: Case) -> None:
    """Replacements are named, shaped and typed like what they replace, cover all slots, and are finite where kept."""
    view, kept = case.view, case.layers[0].aligned["kept"]
    there = {"keys": view.keys, "values": view.values, "rope_positions": view.positions}
    allowed = {"positions": ("keys", "rope_positions"), "values": ("values",), "keys": ("keys", "values")}
    for name, new in replaced(subject, case).items():
        if name not in allowed[subject.changes]:
            raise broken(f"replaces {name!r}, and declares that it changes {subject.changes!r}.")
        old = there[name]
        if new.shape != old.shape or new.dtype != old.dtype:
            raise broken(f"{name}: {new.dtype} {list(new.shape)} instead of {old.dtype} {list(old.shape)}.")
        if not bool(torch.isfinite(new[kept].float()).all()):
            raise broken(f"{name}: kept slots are not finite.")


def _not_positions(post: Any) -> str | None:
    return None if post.changes == "positions" else "it does not change positions"


@law(
    "Queries are turned by one shift per row: kept keys must stand at 0, 1, 2, ... in every head.",
    ("post",),
    one_case,
    unless=_not_positions,
)
def positions_are_contiguous(subject: Any, case: Case) -> None:
    """Kept keys get the rotary positions 0, 1, 2, ...; turning them again changes nothing."""
    kept = case.layers[0].aligned["kept"]
    changes = replaced(subject, case)
    indices = keep_indices(kept)
    for b in range(case.rows):
        for h in range(case.heads):
            count = int(indices.lengths[b, h])
            at = changes["rope_positions"][b, h, indices.indices[b, h, :count]].tolist()
            if at != list(range(count)):
                raise broken(f"row {b}, head {h}: kept keys are turned to {at}.")
    again = case.by_view(lambda v: replace(v, keys=changes["keys"], rope_positions=changes["rope_positions"]))
    expected, got = outcome(subject, case), outcome(subject, again)
    expect_same(subject, case, expected, got, case.valid, "a second time,")
