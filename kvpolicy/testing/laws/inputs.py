"""Laws about what a component may read and must not write: invalid slots, memory, dtypes, layouts, time."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from kvpolicy.testing.cases import Case
from kvpolicy.testing.laws._base import SEES_VIEW, broken, decided, law
from kvpolicy.testing.laws._draws import case_and, cases, kind_of_subject, one_case
from kvpolicy.testing.laws._outcome import expect_same, outcome
from kvpolicy.testing.poison import poisoned_memory

_ALL = (*SEES_VIEW, "allocator")
_SCORERS = ("importance", "redundancy", "mixer")


@law("Everything downstream counts on one finite fp32 number for each slot.", _SCORERS, one_case)
def scores_are_finite_fp32(subject: Any, case: Case) -> None:
    """The result is fp32 `[B, H, N]`, over all slots, and finite where a slot is valid."""
    got = outcome(subject, case)[0]
    view = case.view
    if not isinstance(got, Tensor) or got.dtype != torch.float32 or got.shape != view.shape:
        what = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise broken(f"returned {what} instead of torch.float32 {list(view.shape)}.")
    wrong = (view.valid & ~torch.isfinite(got)).nonzero()
    if len(wrong):
        b, h, n = wrong[0].tolist()
        raise broken(f"row {b}, head {h}, slot {n} is valid and gets {got[b, h, n].item()}.")


@law("The view shows the cache itself: a scorer that writes to it changes what the model attends to.", _ALL, one_case)
def inputs_untouched(subject: Any, case: Case) -> None:
    """Nothing that was given has been written to."""
    before = [(name, t, t.clone()) for name, t in case.tensors()]
    outcome(subject, case)
    for name, now, then in before:
        if not torch.equal(now.contiguous().view(torch.uint8), then.contiguous().view(torch.uint8)):
            raise broken(f"{name} has been written to.")


@law(
    "Padding and free slots hold anything, NaN included; one read is enough to poison a softmax.",
    _ALL,
    case_and(garbage=st.sampled_from([0.0, -1e4, 1e4])),
)
def invalid_slots_unread(subject: Any, case: Case, garbage: float) -> None:
    """What stands in slots that are not valid never reaches a result: NaN there or a number, it is the same."""
    decided(any(not bool(v.all()) for v in case.valid), "all slots are valid")
    expected = outcome(subject, case.with_garbage(garbage))
    got = outcome(subject, case)
    what = f"with NaN instead of {garbage} in slots that are not valid,"
    expect_same(subject, case.with_garbage(garbage), expected, got, case.valid, what)


@law("Memory that was never written differs from run to run and from device to device.", _ALL, one_case, effort=0.5)
def fresh_memory_unread(subject: Any, case: Case) -> None:
    """A result does not change when `torch.empty` hands out NaN."""
    expected = outcome(subject, case)
    with poisoned_memory():
        got = outcome(subject, case)
    expect_same(subject, case, expected, got, case.valid, "with NaN in memory from torch.empty,", exact=True)


@law("The engine hands out slices of larger tensors; `view()` and kernels trip over them.", _ALL, one_case, effort=0.5)
def strides_ignored(subject: Any, case: Case) -> None:
    """Slices of larger tensors give the same result as tensors of their own."""
    what = "with tensors that are not contiguous,"
    expect_same(subject, case, outcome(subject, case), outcome(subject, case.non_contiguous()), case.valid, what)


_HALF = st.sampled_from([torch.float16, torch.bfloat16])


@law(
    "In half precision squares overflow and long sums stop growing; caches are half precision.",
    ("importance", "redundancy"),
    case_and(dtype=_HALF, factor=st.sampled_from([1.0, 2.0**9, 2.0**-9])),
    effort=0.5,
)
def computed_in_fp32(subject: Any, case: Case, dtype: torch.dtype, factor: float) -> None:
    """Keys, values and queries in half precision score as the same numbers in fp32, very large or small ones too."""
    half = case.with_dtype(dtype, factor)
    single = half.with_dtype(torch.float32)
    what = f"with keys, values and queries as {dtype} and not the same numbers as torch.float32,"
    expect_same(subject, single, outcome(subject, single), outcome(subject, half), case.valid, what)


def _two(subject: Any) -> SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"case": cases(subject), "other": cases(subject), "seed": st.integers(0, 3)})


@law("A result that depends on what ran before cannot be repeated, reordered or debugged.", _ALL, _two)
def deterministic(subject: Any, case: Case, other: Case, seed: int) -> None:
    """The same input gives the same bits: after another input, after other random numbers, from an equal component."""
    expected = outcome(subject, case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.rand(3)
        outcome(subject, other)
        got = outcome(subject, case)
    expect_same(subject, case, expected, got, case.valid, "asked again after another input,", exact=True)
    if kind_of_subject(subject) == "policy":
        return
    twin = subject.model_copy()
    outcome(twin, other)
    got = outcome(twin, case)
    expect_same(subject, case, expected, got, case.valid, "asked of a copy with other memories,", exact=True)


def large_case(
    subject: Any, rows: int = 2, slots: int = 384, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    """Make a case of continuous numbers that is large enough for threads and statistics; nothing in it is drawn."""
    from kvpolicy.testing.laws._large import make

    return make(subject, rows=rows, slots=slots, seed=seed, dtype=dtype)


@law("Another machine has another number of cores.", _ALL, effort=0)
def threads_ignored(subject: Any) -> None:
    """One thread and two give the same result on 2 x 2 x 1500 slots."""
    case = large_case(subject, slots=1500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = outcome(subject, case)
        torch.set_num_threads(2)
        got = outcome(subject, case)
    finally:
        torch.set_num_threads(threads)
    expect_same(subject, case, expected, got, case.valid, "with two threads instead of one,")


@law(
    "Models run in bfloat16; a method whose choice hangs on the last bits is not the method that was measured.",
    ("importance", "redundancy", "policy"),
    effort=0,
)
def bf16_keeps_the_set(subject: Any) -> None:
    """A bfloat16 cache keeps at least 95 % of what the fp32 cache keeps, over 50 draws of 384 entries.

    A scorer is asked for its best half.
    """
    case = large_case(subject, rows=50)
    kept, same = 0, 0
    exact, rounded = (_chosen(subject, c) for c in (case, case.with_dtype(torch.bfloat16)))
    for a, b in zip(exact, rounded, strict=True):
        kept += int(a.sum())
        same += int((a & b).sum())
    if same < 0.95 * kept:
        raise broken(f"a bfloat16 cache keeps {same} of the {kept} entries that an fp32 cache keeps.")


def _chosen(subject: Any, case: Case) -> list[Tensor]:
    got = outcome(subject, case)
    if kind_of_subject(subject) == "policy":
        return got
    score = got[0]
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return [rank < score.shape[-1] // 2]
