"""Hypothesis strategy for study specifications."""

from __future__ import annotations

from typing import Any, Final

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

from hypothesis import reject  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.strategies import DrawFn, SearchStrategy  # noqa: E402

from kvpolicy.errors import SpecError  # noqa: E402
from kvpolicy.odd_text import odd_character  # noqa: E402
from kvpolicy.study.design import BUDGET, COMPRESS, POLICY  # noqa: E402
from kvpolicy.study.metrics import METRICS  # noqa: E402
from kvpolicy.study.spec import StudySpec  # noqa: E402
from kvpolicy.testing.strategies import policy_specs  # noqa: E402
from kvpolicy.testing.tables import stand_in_tables  # noqa: E402

__all__ = ["studies"]

_ROOM = 100  # budgets above it hold whatever `policy_specs` protects
# With these every value of `_axes` fits.
_PLAIN: Final[dict[str, Any]] = {
    "budget": {"tokens": _ROOM}, "phase": "decode", "allocator": "uniform", "selector": "top_k", "post": [],
}  # fmt: skip


def _axes() -> dict[str, SearchStrategy[Any]]:
    """Return what the values of each axis are drawn from; any policy has these paths."""
    return {
        BUDGET: st.one_of(
            st.integers(_ROOM, 4096),
            st.sampled_from([{"trace": 0.1}, {"trace": 0.25}, {"fraction": 0.5}, {"tokens": 300}]),
        ),
        COMPRESS: st.sampled_from(["prompt", "context"]),
        "trigger": st.builds(lambda n: {"every": n}, st.integers(1, 256)),
        "protect.prompt": st.booleans(),
        "protect.sinks": st.integers(0, 8),
        "importance": st.sampled_from(["key_norm", "value_norm", {"use": "random", "seed": 3}]),
        "prefill_chunk": st.integers(1, 64),
        "selector": st.sampled_from(["top_k", {"use": "top_k", "scope": "layer"}]),
    }


def _datasets() -> SearchStrategy[Any]:
    return st.sampled_from(
        [
            {"use": "generator", "family": "prompt-recall", "level": "short"},
            {"use": "generator", "family": "trace-recall", "level": "long", "split": "development", "forced": True},
            {"use": "generator", "family": "restated-recall", "level": "medium", "redundancy": 4},
            {"use": "needle", "words": 60, "name": "haystack"},
            {"use": "jsonl", "path": "problems.jsonl", "question": "problem", "grade": "number"},
            {"use": "hub", "id": "someone/something", "template": "Q: {question} A:"},
            {"use": "text", "path": ["one.txt", "two.md"], "tokens": 64},
            "math-500",
            {"use": "gsm8k", "samples": 7, "max_new_tokens": 99},
        ]
    )


@st.composite
def studies(draw: DrawFn, /, **fixed: Any) -> StudySpec:
    """Draw a valid study: a base or whole policies, up to three axes and conditions, any design, datasets and settings.

    Policies may name stand-in tables, which there are inside `kvpolicy.testing.tables.stand_in_tables` only.

    Args:
        draw: given by hypothesis.
        fixed: fields of `StudySpec` that are not drawn.
    """
    kinds = _axes()
    paths = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3, unique=True))
    design = draw(st.sampled_from(["grid", "one-at-a-time", "paired"]))
    lists = {path: draw(st.lists(kinds[path], min_size=1, max_size=3, unique_by=str)) for path in paths}
    inside = draw(st.integers(0, 1 if design == "paired" else len(paths)))  # paired axes would need equal lengths
    fields: dict[str, Any] = {
        "study": draw(st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True)),
        "description": draw(st.text(max_size=20).filter(lambda text: odd_character(text) is None)),
        "design": design,
        "axes": {path: lists[path] for path in paths[:inside]},
        "conditions": {path: lists[path] for path in paths[inside:]},
        "models": draw(st.lists(st.sampled_from(["smollm2", "./a", "org/name"]), min_size=1, max_size=2, unique=True)),
        "datasets": draw(st.lists(_datasets(), min_size=1, max_size=3, unique_by=str)),
        "samples": draw(st.integers(1, 500)),
        "seeds": draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)),
        "sampling": {
            "temperature": draw(st.sampled_from([0.0, 0.6, 1.0])),
            "top_p": draw(st.sampled_from([0.95, 1.0])),
            "max_new_tokens": draw(st.integers(1, 4096)),
        },
        "metrics": draw(st.lists(st.sampled_from(sorted(METRICS)), min_size=1, max_size=4, unique=True)),
        "batch": draw(st.integers(1, 64)),
        "dtype": draw(st.sampled_from(["auto", "float64", "bfloat16"])),
    }
    whole = design != "one-at-a-time" and draw(st.booleans())
    if whole:
        policies = [draw(policy_specs(policy=name, **_PLAIN)) for name in ("first", "second")]
        fields["conditions"] = {**fields["conditions"], POLICY: policies}
    else:
        fields["base"] = draw(policy_specs(policy="base", **_PLAIN))
    if draw(st.booleans()):
        fields["quick"] = {"samples": draw(st.integers(1, 8)), "seeds": [draw(st.integers(0, 9))]}
    try:
        with stand_in_tables():
            return StudySpec(**{**fields, **fixed})
    except SpecError:
        reject()
