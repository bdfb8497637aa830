"""What components return is looked at: one sentence names the component and the layer, whatever is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import kvpolicy
from kvpolicy.contracts.components import BudgetAllocator, ImportanceScorer, Mixer, PostOperation, Protection, Selector
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import BudgetError, ComponentError, ScoreError
from kvpolicy.policy import checks
from kvpolicy.testing import LAWS
from kvpolicy.testing.checking import check, subject_of
from kvpolicy.types import KeepIndices

L, B, H, N, D = 3, 2, 2, 24, 8
BUDGET = [10, 12]


def views(seed=0) -> list[CacheView]:
    """Three layers in one arena, so that they may be folded."""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(L, B, H, N, D, generator=g), torch.randn(L, B, H, N, D, generator=g)
    positions = torch.arange(N, dtype=torch.int32).expand(B, H, N)
    seen = torch.full((B,), N)
    ones = torch.ones(B, H, N, dtype=torch.bool)
    return [
        CacheView(
            keys[i], values[i], positions, ones, 0.3, i, L, seen // 2, seen, torch.zeros_like(seen),
            state={"mine": torch.zeros(B, H, N)},
        )
        for i in range(L)
    ]  # fmt: skip


def policy(**parts: Any) -> kvpolicy.Policy:
    return replace(kvpolicy.load("knorm", budget=12).build(), **parts)


def decide(parts: dict[str, Any]) -> kvpolicy.policy.decision.Decision:
    return policy(**parts).decide(views(), BUDGET)


def top(scores, counts, protected, valid, slots) -> KeepIndices:
    return kvpolicy.ops.top_k(scores, counts, protected, valid)


def selector(change, *, exact=True, same=False) -> Selector:
    class Mine(Selector):
        same_for_layers: ClassVar[bool] = same

        def select(self, scores, counts, protected, valid, slots):
            return change(top(scores, counts, protected, valid, slots), scores, counts)

    Mine.exact = exact
    return Mine()


def allocator(change, kind="per_head") -> BudgetAllocator:
    class Mine(BudgetAllocator):
        counts: ClassVar[Any] = kind

        def allocate(self, request):
            counts = [torch.minimum(request.budget[:, None], v) for v in request.valid]
            return change(counts, request)

    return Mine()


def scorer(change) -> ImportanceScorer:
    class Mine(ImportanceScorer):
        def score(self, view):
            return change(-view.keys.norm(dim=-1), view)

    return Mine()


def mixer(change) -> Mixer:
    class Mine(Mixer):
        uses_redundancy: ClassVar[bool] = False

        def mix(self, importance, redundancy, view):
            return change(importance, view)

    return Mine()


def protection(change, effect="keep") -> Protection:
    class Mine(Protection):
        def mask(self, view):
            return change(view.oldest(2), view)

    Mine.effect = effect
    return Mine()


def changed(kept, **new) -> KeepIndices:
    return kept._replace(**new)


def moved(by):
    """Add to what one head of one row of the second layer gets."""
    return lambda counts, _: [c + (i == 1) * by * torch.tensor([[0, 0], [0, 1]]) for i, c in enumerate(counts)]


def at_end(kept):
    """Make the slots behind the count of the first row something else."""
    return changed(kept, indices=torch.cat([kept.indices, kept.indices[..., :1]], -1))


BAD = {
    "slot 0 for all": (selector(lambda k, *_: changed(k, indices=k.indices * 0)), "do not increase strictly"),
    "descending": (selector(lambda k, *_: changed(k, indices=k.indices.flip(-1))), "do not increase strictly"),
    "padding that is no repetition": (selector(lambda k, *_: at_end(k)), "do not repeat the last one"),
    "shorter lists": (selector(lambda k, *_: changed(k, lengths=k.lengths - 1)), "row 0, head 0"),
    "shorter columns": (selector(lambda k, *_: changed(k, indices=k.indices[..., :-1])), "another number of entries"),
    "slots that do not exist": (selector(lambda k, *_: changed(k, indices=k.indices + N)), "slots that do not exist"),
    "negative slots": (selector(lambda k, *_: changed(k, indices=k.indices - N)), "slots that do not exist"),
    "columns without end": (
        selector(lambda k, *_: changed(k, indices=k.indices.repeat(1, 1, 3))), r"returned \d+ slots of 24"
    ),
    "a list": (selector(lambda k, *_: k.indices.tolist()), "returned list instead of KeepIndices"),
    "int32 slots": (selector(lambda k, *_: changed(k, indices=k.indices.int())), "torch.int32.*instead of torch.int64"),
    "slots elsewhere": (selector(lambda k, *_: changed(k, indices=k.indices.to("meta"))), "on meta instead of .*cpu"),
    "lengths of rows": (selector(lambda k, *_: changed(k, lengths=k.lengths[:, 0])), r"\(lengths\).*\[2\]"),
    "writes to the scores": (selector(lambda k, s, _: (s.zero_(), k)[1]), "wrote to `scores`"),
    "writes to the counts": (selector(lambda k, _, c: (c.sub_(1), changed(k, lengths=c))[1]), "wrote to `counts`"),
    "more than it may": (
        selector(lambda k, _, c: changed(k, lengths=torch.full_like(c, k.indices.shape[-1])), exact=False), "number"
    ),
    "fewer than protected": (
        selector(lambda k, _, c: changed(k, lengths=c * 0, indices=k.indices * 0), exact=False), "number of entries"
    ),
    "more than is there": (allocator(moved(100)), "row 1, head 1 112 entries, where of 24 that may stay 2 are"),
    "less than is protected": (allocator(moved(-11)), "row 1, head 1 1 entries, where of 24 that may stay 2 are"),
    "negative": (allocator(moved(-100)), "-88 entries"),
    "2^62": (allocator(moved(2**62)), "row 1, head 1 461168601"),
    "not the sum": (allocator(moved(1)), "gives row 1 73 entries in all heads and layers instead of 72"),
    "equal ones that are not": (allocator(moved(1), "equal"), "layer 1: gives row 1, head 1 13 entries, where the"),
    "a layer left out": (allocator(lambda c, _: c[1:]), "returned 2 tensors for the 3 layers 0, 1, 2"),
    "one tensor": (allocator(lambda c, _: torch.stack(c)), "returned Tensor for the 3 layers"),
    "float counts": (allocator(lambda c, _: [x.float() for x in c]), "torch.float32.*instead of torch.int64"),
    "counts of rows": (allocator(lambda c, _: [x[:, 0] for x in c]), r"layer 0: returned torch.int64 \[2\]"),
    "counts elsewhere": (allocator(lambda c, _: [x.to("meta") for x in c]), "on meta instead of"),
    "writes to the request": (allocator(lambda c, r: (r.scores[1].neg_(), c)[1]), r"wrote to `request.scores\[1\]`"),
    "scores elsewhere": (scorer(lambda s, _: s.to("meta")), "returned torch.float32.*on meta instead of.*cpu"),
    "half scores": (scorer(lambda s, _: s.half()), "returned torch.float16"),
    "scores of heads": (scorer(lambda s, _: s[:, :1]), r"\[2, 1, 24\] instead of"),
    "no tensor": (scorer(lambda s, _: 1.0), "returned float instead of"),
    "writes to the keys": (scorer(lambda s, v: (v.keys.mul_(2), s)[1]), "wrote to `view.keys`"),
    "writes to a slice": (scorer(lambda s, v: (v.values[..., 0].zero_(), s)[1]), "wrote to `view.values`"),
    "writes to the state": (scorer(lambda s, v: (v.state["mine"].add_(1), s)[1]), r"wrote to `view.state\['mine'\]`"),
    "mixes in place": (mixer(lambda i, _: i.mul_(2)), "wrote to `importance`"),
    "mixes in half": (mixer(lambda i, _: i.bfloat16()), "returned torch.bfloat16"),
    "a float mask": (protection(lambda m, _: m.float()), "torch.float32.*instead of torch.bool"),
    "a mask of heads": (protection(lambda m, _: m[:, :1]), r"\[2, 1, 24\] instead of"),
    "a mask elsewhere": (protection(lambda m, _: m.to("meta"), "drop"), "on meta instead of"),
    "clears validity": (protection(lambda m, v: (v.valid.logical_and_(~m), m)[1]), "wrote to `view.valid`"),
}  # fmt: skip
FIELD = {
    Selector: "selector", BudgetAllocator: "allocator", ImportanceScorer: "importance", Mixer: "mixer",
    Protection: "protections",
}  # fmt: skip


def parts_of(component) -> dict[str, Any]:
    field = next(name for kind, name in FIELD.items() if isinstance(component, kind))
    if field == "protections":
        return {field: (component,)}
    return {field: component, "protections": (protection(lambda m, _: m),)}


@pytest.mark.parametrize("what", BAD)
def test_a_component_that_breaks_its_contract_is_named(what):
    component, words = BAD[what]
    with pytest.raises(ComponentError, match=words) as caught:
        decide(parts_of(component))
    message = str(caught.value)
    assert message.startswith("Mine")
    assert message.count("\n") == 0
    assert message.endswith(".")
    totals = ("layers", "all heads and layers")
    assert "layer " in message or any(word in message for word in totals)


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize("same", [False, True])
def test_a_slot_that_must_stay_or_go_is_noticed_under_every_scope(scope, same):
    """A selector that does not look at its masks, with layers one by one or folded."""

    class Blind(Selector):
        same_for_layers: ClassVar[bool] = same

        def select(self, scores, counts, protected, valid, slots):
            nothing = torch.zeros_like(protected)
            return kvpolicy.ops.top_k(slots.positions.float(), counts, nothing, ~nothing)

    keep, drop = protection(lambda m, _: m), protection(lambda m, v: v.newest(3), "drop")
    with pytest.raises(ComponentError, match="Blind in layer 0: does not keep all protected slots in row 0, head 0"):
        decide({"selector": Blind(scope=scope), "protections": (keep,)})
    with pytest.raises(ComponentError, match="Blind in layer 0: keeps slots that may not stay in row 0, head 0"):
        decide({"selector": Blind(scope=scope), "protections": (drop,)})


def test_the_layer_that_is_wrong_is_named_when_layers_are_chosen_together():
    wrong = selector(lambda k, *_: changed(k, indices=torch.cat([k.indices[:3], k.indices[3:] * 0])), same=True)
    with pytest.raises(ComponentError, match=r"Mine in layer 1: .* in row 1, head 0"):
        decide({"selector": wrong})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_name_layer_and_scorer(value):
    def broken(scores, view):
        return torch.where((torch.tensor(view.layer_idx) == 2) & (view.positions == 5), value, scores)

    for scope in ("head", "layer"):
        chosen = kvpolicy.load("knorm").replace("selector.scope", scope).build().selector
        with pytest.raises(
            ScoreError, match=r"policy 'knorm': the retention scores of layer 2 are not finite.*in Mine"
        ):
            decide({"importance": scorer(broken), "selector": chosen})
    # Where nothing may stay there may be anything.
    dropped = protection(lambda m, v: v.positions == 5, "drop")
    assert decide({"importance": scorer(broken), "protections": (dropped,)}).lengths[2].tolist() == [[10, 10], [12, 12]]


def test_who_stumbles_over_a_wrong_score_or_budget_is_not_blamed():
    def stumbles(counts, request):
        if not bool(torch.stack(request.scores).isfinite().all()):
            raise RuntimeError("unexpected number")
        return [
            torch.minimum(c, p) if bool((p > c).any()) else c for c, p in zip(counts, request.protected, strict=True)
        ]

    nan = scorer(lambda s, _: s * float("nan"))
    with pytest.raises(ScoreError, match="not finite"):
        decide({"importance": nan, "allocator": allocator(stumbles)})
    everything = protection(lambda m, v: v.valid)
    with pytest.raises(BudgetError, match="budget: 10 entries per head are fewer than the 24 that policy 'knorm'"):
        decide({"protections": (everything,), "allocator": allocator(stumbles)})


@pytest.mark.parametrize(("scope", "words"), [("layer", "in all heads together"), ("model", "in all heads and layers")])
def test_a_shared_set_that_cannot_hold_what_any_head_protects_says_so(scope, words):
    spec = kvpolicy.load("knorm", budget=10).replace("selector.scope", scope)
    shared = spec.replace("protect", {"large_values": {"count": 8, "newest": 0}}).build()
    with pytest.raises(BudgetError, match=rf"fewer than the \d+ that policy 'knorm' protects {words}"):
        shared.decide(views(), BUDGET)


def test_inference_tensors_have_no_version_and_are_left_to_the_law():
    class Writes(ImportanceScorer):
        """Writes to the keys behind their version counter."""

        def score(self, view):
            scores = -view.keys.float().norm(dim=-1).masked_fill(~view.valid, 0.0)
            view.keys.data[view.valid] = 0.0
            return scores

    with torch.inference_mode():
        policy().decide(views(), BUDGET)
        decide({"importance": BAD["writes to the keys"][0]})
    (result,) = check(subject_of(Writes), laws=[LAWS["inputs_untouched"]], shrink=False)
    assert result.status == "failed"
    assert "keys has been written to" in str(result.failure)


class Posts(PostOperation):
    changes: ClassVar[Any] = "values"

    made: Any = None

    def apply(self, view, kept):
        return self.made(view)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda v: {"keys": v.keys}, "replaces 'keys', and declares `changes = 'values'`"),
        (lambda v: {"values": v.values.half()}, r"\(values\): returned torch.float16"),
        (lambda v: {"values": v.values[:, :, :5]}, r"\(values\): returned torch.float32 \[2, 2, 5, 8\] instead of"),
        (lambda v: [v.values], "returned list instead of a mapping"),
    ],
)
def test_replacements_are_looked_at(made, words):
    view = views()[1]
    with pytest.raises(ComponentError, match=f"Posts in layer 1.*{words}"):
        checks.replacements(made(view), view, Posts())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"other": torch.zeros(B, H, N)}, "returned slot state 'other', and declares accumulated_attention"),
        ({"accumulated_attention": torch.zeros(B, H, N, dtype=torch.float64)}, "returned torch.float64"),
        ({"accumulated_attention": torch.zeros(B, H)}, r"\[2, 2\] instead of"),
        (torch.zeros(B, H, N), "returned Tensor instead of a mapping"),
    ],
)
def test_slot_state_is_looked_at(made, words):
    component = kvpolicy.load("h2o").build().importance
    with pytest.raises(ComponentError, match=f"accumulated_attention in layer 1.*{words}"):
        checks.state(made, views()[1], component)
