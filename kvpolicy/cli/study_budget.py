"""`kvpolicy study budget`: the smallest budget that is good enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import study_source
from kvpolicy.cli.study_options import Device, Out, Quick
from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvpolicy.study.certify import TestedBudget
    from kvpolicy.study.sufficient import BudgetAnswer


def budget(
    study: study_source.PublishedArgument,
    *,
    loss: Annotated[
        float, typer.Option(help="Largest loss against the full cache that is good enough: 0.02 is 2 points.")
    ] = 0.02,
    confidence: Annotated[float, typer.Option(help="With which each answer holds.")] = 0.95,
    metric: Annotated[str | None, typer.Option(help="exact, score or progress; the study's first if left out.")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="All answers hold together with the confidence, not each by itself.")
    ] = False,
    quick: Quick = False,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Say which is the smallest budget whose loss against the full cache is below a bound, with a confidence."""
    from kvpolicy.cli.terminal import messages, output, widen
    from kvpolicy.study.sufficient import sufficient

    for option, value in (("--loss", loss), ("--confidence", confidence)):
        if not 0 < value < 1:
            raise KVPolicyError(f"{option}: should be a number between 0 and 1, such as 0.02 or 0.95, got {value:g}.")
    source = study_source.find(study, quick=quick, out=out, device=device, published=True)
    with source.opened() as results, messages().status("reading"):
        asked, caution = source.asked(results)
        chosen, answers = sufficient(results, asked, loss=loss, confidence=confidence, metric=metric, together=together)
    if caution is not None:
        messages().print(caution, soft_wrap=True)
    console = output()
    table = _table(answers)
    widen(console, [table])
    console.print(table)
    for answer in answers:
        console.print(_sentence(answer, loss), soft_wrap=True)
    how = "All of them hold together" if together else "Each of them holds"
    console.print(
        f"{how} with a confidence of {100 * confidence:g} %, for other problems of the same kind, model and settings. "
        f"Loss is of {chosen}, full cache minus policy, in points; `at most` is its upper bound.",
        soft_wrap=True,
    )
    if all(answer.smallest is None for answer in answers):
        raise typer.Exit(1)


def _table(answers: Sequence[BudgetAnswer]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("dataset", "policy", "budget", "problems", "loss", "at most", "p", "good enough"):
        table.add_column(heading, justify="left" if heading in ("dataset", "policy", "good enough") else "right")
    for answer in answers:
        for i, (label, found) in enumerate(zip(answer.budgets, answer.tested, strict=True)):
            who = (answer.dataset, _named(answer), label, f"{answer.problems:,}") if not i else ("", "", label, "")
            numbers = (f"{100 * found.loss:z.1f}", f"{100 * found.at_most:.1f}", f"{found.p:.2g}")
            table.add_row(*who, *numbers, _verdict(found))
    return table


def _verdict(found: TestedBudget) -> str:
    return "yes" if found.certified else "not shown" if found.reached else "not tried"


def _named(answer: BudgetAnswer) -> str:
    return f"{answer.policy} ({answer.condition})" if answer.condition else answer.policy


def _sentence(answer: BudgetAnswer, loss: float) -> str:
    place = f"{answer.dataset} · {answer.model}, {_named(answer)}"
    if answer.smallest is not None:
        return f"{place}: {answer.smallest} is the smallest budget that loses less than {100 * loss:g} points."
    text = f"{place}: no budget of the study is shown to lose less than {100 * loss:g} points"
    if answer.foreseen is not None:
        return (
            f"{text}; if others go like these, about {answer.foreseen:,} problems would show it of {answer.budgets[0]}."
        )
    return f"{text}."
