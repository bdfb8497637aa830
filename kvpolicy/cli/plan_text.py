"""A plan of memory, printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from kvpolicy.cli.explaining import wrapped
from kvpolicy.cli.terminal import output, widen
from kvpolicy.html_text import size as short

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvpolicy.cli.capacity import RowNeeds
    from kvpolicy.cli.plan_answer import CapacityPlan


def print_plan(plan: CapacityPlan, ranks: int) -> None:
    """Print what was asked, a table of both caches, the gains, and where they stop."""
    console = output()
    width = min(console.width, 110)
    asked = plan.asked
    text = f"{asked.name}: {asked.length:,} tokens a row, {asked.prompt:,} of them the prompt"
    of_rank = f", on each of {ranks} devices" if ranks > 1 else ""
    console.print(f"{text}{of_rank}\n", soft_wrap=True)
    for label, words in _head(plan):
        console.print(wrapped(label, words, width), soft_wrap=True)
    table = _table(plan)
    widen(console, [table])
    console.print()
    console.print(table)
    console.print()
    for label, words in (*_gains(plan), *_stops(plan)):
        console.print(wrapped(label, words, width), soft_wrap=True)


def _head(plan: CapacityPlan) -> Iterator[tuple[str, str]]:
    shape, size, machine = plan.asked.shape, plan.asked.size, plan.asked.machine
    what = " and ".join(f"{n} layers x {heads} KV heads x {dim}" for n, heads, dim in shape.groups)
    yield "model", f"{shape.source}: {what}, {shape.dtype}."
    yield "per token", f"{short(shape.bytes_per_token)} of keys and values for one row."
    count = f", {size.parameters:,} parameters" if size.parameters else ""
    yield "weights", f"{short(size.weights)}{count}."
    if shape.others:
        kept = "not counted, so that the numbers below are too high" if size.state is None else short(size.state)
        yield "others", f"{shape.others} layers keep a window or a state of their own for each row: {kept}."
    elif size.state is None:
        yield "others", "What layers without full attention keep is not known here and not counted."
    yield "memory", f"{machine.name}: {short(machine.cache)} for caches."


def _table(plan: CapacityPlan) -> Table:
    table = Table("", "full", plan.asked.name, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def line(label: str, full: str, under: str) -> None:
        table.add_row(label, full, under)

    both = plan.full, plan.under

    def pair(label: str, write: Callable[[RowNeeds], str]) -> None:
        line(label, write(both[0]), write(both[1]))

    pair("entries per KV head and layer, at most", lambda row: f"{row.course.peak:,}")
    pair("    read by a step, on average", lambda row: f"{row.course.mean:,.0f}")
    pair("keys and values of a row, at most", lambda row: short(row.keys_values))
    pair("    allocated in transformers, at most", lambda row: short(row.allocated))
    pair("    positions, slot state, queries, at most", lambda row: short(row.beside))
    line("rows at once in transformers", f"{plan.full_rows:,}", f"{plan.rows:,}")
    pool = plan.pool
    most = "-" if pool.most is None else f"{pool.most:,}"
    served = "-" if pool.rows is None else f"{pool.rows:,}"
    line(f"blocks of a request in vLLM, of {pool.blocks:,}", f"{pool.full:,}", most)
    line("requests at once in vLLM", f"{pool.full_rows:,}", served)
    if plan.asked.machine.bandwidth is not None:
        for name, (whole_rows, slow, rows, fast) in plan.speeds.items():
            count = f" ({whole_rows:,}, {rows:,})" if name != "one row" else ""
            line(f"tokens/s at most, {name}{count}", f"{slow:,.0f}", f"{fast:,.0f}")
    return table


def _gains(plan: CapacityPlan) -> Iterator[tuple[str, str]]:
    gains = ", ".join(f"{fast / slow:,.2f}x with {name}" for name, (_, slow, _, fast) in plan.speeds.items())
    if not gains:
        yield "gain", "The whole cache does not fit at all, so there is nothing to compare with."
        return
    yield "gain", f"{gains} (estimates)."
    yield (
        "",
        (
            "By bandwidth and arithmetic alone: weights, and what is held, are read once a step, and compactions read "
            "keys once and move what stays. Scores, launches and prompts cost more; measure with benchmarks/."
        ),
    )


def _stops(plan: CapacityPlan) -> Iterator[tuple[str, str]]:
    asked, policy = plan.asked, plan.asked.policy
    label = iter(("stops", *[""] * 9))
    if policy.budget.fraction == 1.0:
        yield next(label), "This policy keeps everything and gains nothing."
        return
    if policy.phase == "prefill":
        yield (
            next(label),
            "What is decoded is all kept: only the prompt is compacted, and memory grows with the answer.",
        )
    elif policy.bound is None:
        yield next(label), "The budget is a share of the text, so that memory grows with it, only slower."
    else:
        yield next(label), f"Of texts of up to {policy.bound:,} tokens nothing is evicted, so that nothing is gained."
        yield next(label), _longest(plan)
    if not plan.under.course.compactions:
        yield next(label), f"Nothing is compacted within {asked.length:,} tokens."
    if policy.counts != "equal":
        yield (
            next(label),
            "Heads hold different numbers; the sum is what the budget says, and the worst case is counted.",
        )
    if plan.pool.refused is not None:
        yield next(label), f"Not in vLLM: {plan.pool.refused}"
    full, under = plan.arithmetic_from
    if under is not None:
        whole = "" if full is None else f" ({full:,} with the whole cache)"
        yield next(label), f"From {under:,} rows on{whole} arithmetic is what a step waits for: more rows gain nothing."
    elif asked.machine.arithmetic is None:
        yield next(label), "Where arithmetic becomes the limit is not known without --gpu."
    else:
        yield next(label), "Under it a step waits for memory at any number of rows, never for arithmetic."
    if asked.size.longest is not None and asked.length > asked.size.longest:
        yield next(label), f"The model reads {asked.size.longest:,} tokens at most."


def _longest(plan: CapacityPlan) -> str:
    tokens = f"One row of the whole cache fits up to {plan.longest_full:,} tokens"
    longest = plan.asked.size.longest
    reads = "" if longest is None else f" (the model reads {longest:,})"
    return f"{tokens}{reads}; under {plan.asked.name} of any length, if its prompt fits: it is held whole at first."
