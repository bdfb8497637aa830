"""Hypothesis strategies for everything that a component or a policy is given.

Tensors are small and drawn as values, not as seeds, so that a failing example shrinks to something that can be read.
Most slots hold one of 256 fixed vectors: two slots easily hold the same key, the zero key, or keys of equal direction
or norm. Numbers lie on a coarse grid, so ties are exact and bfloat16 holds them without loss. Slots that are not valid
hold NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

import torch  # noqa: E402
from hypothesis import reject  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.strategies import DrawFn, SearchStrategy  # noqa: E402
from torch import Tensor  # noqa: E402

from kvpolicy.contracts.components import NEEDS, Component, SlotState  # noqa: E402
from kvpolicy.contracts.view import CacheView, Rope  # noqa: E402
from kvpolicy.errors import SpecError, UnsupportedError  # noqa: E402
from kvpolicy.loading.installed import catalog  # noqa: E402
from kvpolicy.spec import PolicySpec  # noqa: E402
from kvpolicy.spec.reference import ComponentRef, resolve  # noqa: E402
from kvpolicy.testing import poison  # noqa: E402
from kvpolicy.testing.parameters import components  # noqa: E402
from kvpolicy.testing.scaling import SHARERS  # noqa: E402
from kvpolicy.testing.tables import stand_in_tables  # noqa: E402
from kvpolicy.testing.tensors import HEAD_DIM, codes, positions_of, scores, valid_slots, vectors  # noqa: E402

__all__ = ["MAX_SLOTS", "budgets", "cache_views", "components", "policy_specs", "scores"]

MAX_SLOTS = 16
"""Most slots that are drawn, the one size cap."""
MODEL_DIM = 6
"""Output dimensions of the drawn output projection."""


def _checked_needs(needs: Collection[str]) -> frozenset[str]:
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise UnsupportedError(f"needs: there is no {', '.join(unknown)}; known are {', '.join(NEEDS)}.")
    return frozenset(needs)


@st.composite
def cache_views(
    draw: DrawFn,
    *,
    needs: Collection[str] = (),
    states: Sequence[SlotState] = (),
    observe: int = 0,
    slots: int | None = None,
    valid: Tensor | None = None,
    ragged: bool = True,
    shared: Literal["none", "heads"] = "none",
    layer: tuple[int, int] | None = None,
    seen_by: CacheView | None = None,
    still_rope: bool = False,
) -> CacheView:
    """Draw a view of one layer: 1 to 3 rows, 1 to 3 KV heads, 1 to 3 query heads each, up to `MAX_SLOTS` slots.

    Args:
        draw: given by hypothesis.
        needs: what components need; ``queries``, ``rope`` and the extras are drawn only if they are among them.
        states: slot state to draw, not negative.
        observe: queries to draw at most; some rows have fewer valid ones.
        slots: number of slots; drawn if None.
        valid: bool `[B, H, N]`; drawn if None.
        ragged: heads may hold different numbers of valid entries.
        shared: ``heads``: all heads of a row hold the same positions.
        layer: (layer index, number of layers); drawn if None.
        seen_by: a view of another layer; positions, lengths and queries' positions are taken from it.
        still_rope: the rotary embedding has frequency 0, so that equal keys are equal without it too.

    Raises:
        UnsupportedError: there is no such need.
    """
    needs = _checked_needs(needs)
    if valid is None:
        rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        slots = draw(st.integers(1, MAX_SLOTS)) if slots is None else slots
        valid = draw(valid_slots(rows, heads, slots, ragged=ragged))
    rows, heads, slots = valid.shape
    positions, seen = draw(positions_of(valid, observe, shared))
    if seen_by is not None:
        rows = seen_by.shape[0]
        positions, seen = seen_by.positions.clamp(0, 10**6), [int(n) for n in seen_by.seen]
    at, count = layer if layer is not None else (draw(st.integers(0, 2)), 3)

    def spoilt(x: Tensor) -> Tensor:
        mask = ~valid.reshape(*valid.shape, *[1] * (x.dim() - 3))
        return torch.where(mask, poison.fill(torch.empty_like(x)), x)

    prompts = torch.tensor([code % (n + 1) for code, n in zip(draw(codes(rows)), seen, strict=True)])
    compactions = torch.tensor([code % 3 for code in draw(codes(rows))])
    if seen_by is not None:
        prompts, compactions = seen_by.prompt_length, seen_by.compaction
    fields: dict[str, object] = {}
    group = draw(st.integers(1, 3))
    if "queries" in needs or observe:
        fields = draw(_queries((rows, heads, group), max(observe, 1), seen, seen_by))
    if "rope" in needs:
        frequencies = torch.tensor([0.0, 0.0] if still_rope else [1.0, 0.25])
        fields["rope"] = Rope(frequencies, interleaved=draw(st.booleans()))
        turned = draw(st.booleans())
        rank = (valid.cumsum(-1) - 1).clamp(min=0).to(torch.int32)
        fields["rope_positions"] = spoilt(rank if turned else positions)
    if draw(st.booleans()):
        fields["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    return CacheView(
        keys=spoilt(draw(vectors(rows, heads, slots))),
        values=spoilt(draw(vectors(rows, heads, slots))),
        positions=spoilt(positions),
        valid=valid,
        scale=draw(st.sampled_from([0.5, 0.25])),
        layer_idx=at,
        num_layers=count,
        prompt_length=prompts,
        seen=torch.tensor(seen),
        compaction=compactions,
        state={s.name: spoilt(draw(_state(s, rows, heads, slots))) for s in states},
        budget=torch.tensor([1 + code % MAX_SLOTS for code in draw(codes(rows))]),
        extras=draw(_extras(needs, (rows, heads, group), valid)),
        **fields,  # type: ignore[arg-type]
    )


@st.composite
def _state(draw: DrawFn, state: SlotState, rows: int, heads: int, slots: int) -> Tensor:
    drawn = torch.tensor(draw(codes(rows * heads * slots)), dtype=torch.float32).reshape(rows, heads, slots)
    return (drawn / 8 if state.dtype.is_floating_point else drawn).to(state.dtype)


@st.composite
def _extras(draw: DrawFn, needs: Collection[str], sizes: tuple[int, int, int], valid: Tensor) -> Mapping[str, Tensor]:
    """Draw what is declared as a need, for so many rows, heads and query heads per head."""
    rows, heads, group = sizes
    found: dict[str, Tensor] = {}
    if "query_statistics" in needs:
        count = torch.tensor([code % 4 for code in draw(codes(rows))])
        some = (count > 0)[:, None, None, None]
        factor = draw(vectors(rows, heads, group, 2))
        found["query_count"] = count
        found["query_mean"] = draw(vectors(rows, heads, group)) * some
        found["query_covariance"] = factor.transpose(-1, -2) @ factor * some.unsqueeze(-1) / 2
    if "weights" in needs:
        found["output_projection"] = draw(scores(heads, group, HEAD_DIM, MODEL_DIM)) / 16
    if "modality" in needs:
        found["modality"] = valid & (torch.tensor(draw(codes(valid.numel()))).reshape(valid.shape) % 2 == 1)
    return found


@st.composite
def _queries(
    draw: DrawFn, sizes: tuple[int, int, int], most: int, seen: list[int], seen_by: CacheView | None
) -> dict[str, object]:
    """Draw the last queries, NaN where a row has fewer; in order of position or turned round, as a ring holds them."""
    if seen_by is not None and seen_by.query_positions is not None and seen_by.query_valid is not None:
        positions, valid = seen_by.query_positions, seen_by.query_valid
        count = positions.shape[1]
    else:
        count = draw(st.integers(1, most))
        shift = draw(st.integers(0, count - 1))
        order = [(i + shift) % count for i in range(count)]
        positions = torch.tensor([[n - count + i for i in order] for n in seen], dtype=torch.int32)
        valid = positions >= 0
        positions = positions.masked_fill(~valid, torch.iinfo(torch.int32).max)
    rows, heads, group = sizes
    queries = draw(vectors(rows, heads, group, count)).clone()
    queries[~valid[:, None, None].expand(-1, heads, group, -1)] = float("nan")
    sinks = draw(scores(heads, group)) / 4 if draw(st.booleans()) else None
    return {"queries": queries, "query_positions": positions, "query_valid": valid, "attention_sinks": sinks}


def budgets(*, least: int = 1, most: int = MAX_SLOTS + 2) -> SearchStrategy[int]:
    """Draw entries per head to keep; more than there are slots is possible."""
    return st.integers(least, max(least, most))


@st.composite
def policy_specs(draw: DrawFn, /, **fixed: Any) -> PolicySpec:
    """Draw a valid composition of registered components with drawn parameters and a small budget.

    Args:
        draw: given by hypothesis.
        fixed: fields of `PolicySpec` that are not drawn, as in a file: ``importance="key_norm"``.
    """
    phase = fixed.get("phase") or draw(st.sampled_from(["decode", "both", "prefill"]))
    fields: dict[str, Any] = {"policy": "drawn", "phase": phase}
    for kind in ("mixer", "importance", "redundancy", "trigger", "allocator", "selector"):
        fields[kind] = _canonical(kind, fixed[kind]) if kind in fixed else draw(_references(kind, phase))
    mixer, selector = fields["mixer"].component, fields["selector"].component
    for kind in ("importance", "redundancy"):
        if kind not in fixed and not getattr(mixer, f"uses_{kind}"):
            fields[kind] = "none"
    scorers = [fields[k].component for k in ("importance", "redundancy") if fields[k] != "none"]
    if "allocator" not in fixed and not _may_pool(fields["allocator"].component, mixer, scorers, selector.scope):
        fields["allocator"] = "uniform"
    protections: list[Any] = []
    if "protect" not in fixed:
        drawn = draw(st.lists(_references("protection", phase), max_size=3, unique_by=lambda ref: ref.use))
        fields["protect"] = {ref.use: ref.params for ref in drawn}
        protections = [ref.component for ref in drawn]
    even = fields["allocator"] == "uniform" or fields["allocator"].component.counts == "equal"
    if "post" not in fixed:
        drawn = draw(st.lists(_references("post", phase), max_size=1))
        ragged = not even or not selector.exact
        fields["post"] = [p for p in drawn if not (ragged and getattr(p.component, "changes", "") == "positions")]
    if draw(st.booleans()):
        fields["prefill_chunk"] = draw(st.integers(1, 6))
    fields["budget"] = {"fraction": draw(st.sampled_from([0.5, 1.0]))} if draw(st.integers(0, 4)) == 4 else None
    if fields["budget"] is None:
        shared = selector.scope != "head"
        many = [SHARERS if shared and not p.same_for_heads else 1 for p in protections]
        reserved = sum(n * MAX_SLOTS // 3 for n in many)
        fields["budget"] = {"tokens": reserved + draw(st.integers(1, MAX_SLOTS // 2))}
    try:
        with stand_in_tables():
            return PolicySpec(**{**fields, **fixed})
    except SpecError:
        reject()


def _references(kind: str, phase: str) -> SearchStrategy[ComponentRef]:
    """Draw a registered component of a kind that works at a phase."""
    wanted = {"prefill", "decode"} if phase == "both" else {phase}
    entries = [entry for entry in catalog().entries(kind) if wanted <= entry.component.phases]
    drawn = st.sampled_from(entries).flatmap(
        lambda entry: components(entry.component).map(lambda made: ComponentRef(entry.name, made))
    )
    return drawn.filter(lambda ref: all(wanted <= member.phases for member in ref.component.members()))


def _canonical(kind: str, given: Any) -> ComponentRef:
    """Return a component that is given as in a file, or as itself."""
    if isinstance(given, Component):
        return ComponentRef(catalog().name_of(type(given)), given)
    with stand_in_tables():
        return resolve(kind, {"use": given} if isinstance(given, str) else given, (kind,), catalog())


def _may_pool(allocator: Any, mixer: Any, scorers: Sequence[Any], scope: str) -> bool:
    """Whether an allocator goes with what it pools and with the scope of the selector."""
    if (scope == "model" and allocator.counts != "equal") or (scope == "layer" and allocator.counts == "per_head"):
        return False
    if allocator.scores_needed == "none" or allocator.normalises:
        return True
    across = ["heads"] if allocator.scores_needed == "layer" else ["heads", "layers"]
    return mixer.keeps_comparability and all(getattr(s, f"comparable_across_{a}") for s in scorers for a in across)
