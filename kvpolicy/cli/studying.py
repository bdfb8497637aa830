"""`kvpolicy study`: plan, run and look at studies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.study_budget import budget
from kvpolicy.cli.study_options import Device, Name, Out, Quick, read_study
from kvpolicy.cli.study_overrides import Data, Datasets, Models, NewTokens, Overrides, Samples, Seeds
from kvpolicy.cli.study_pruning import prune
from kvpolicy.cli.study_reporting import report
from kvpolicy.cli.study_source import Argument, find, make_plan
from kvpolicy.errors import KVPolicyError, UnreachableError

if TYPE_CHECKING:
    from rich.console import Console

    from kvpolicy.study.design import Variant
    from kvpolicy.study.estimate import StudySize
    from kvpolicy.study.executors import Executor
    from kvpolicy.study.spec import StudySpec

study = typer.Typer(
    help="Ablation studies: what is one component, budget or protection worth?",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Rows that run together; changes results by rounding at most, in float64 hardly ever.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Local processes, or tasks on Ray at the same time.")
]


@study.command()
def plan(
    study: Name,
    *,
    quick: Quick = False,
    out: Out = None,
    batch: Batch = None,
    workers: Workers = None,
    device: Device = "auto",
    model: Models = None,
    dataset: Datasets = None,
    data: Data = None,
    samples: Samples = None,
    seeds: Seeds = None,
    max_new_tokens: NewTokens = None,
    probe: Annotated[bool, typer.Option(help="Time a few tokens, to estimate how long it takes.")] = True,
) -> None:
    """Say how many variants, runs and tokens a study has, and about how long it takes; nothing is recorded."""
    from kvpolicy.cli.terminal import messages, output, widen
    from kvpolicy.study.asked import Asked
    from kvpolicy.study.estimate import measure
    from kvpolicy.study.executors import cores, default_workers
    from kvpolicy.study.outline import outline
    from kvpolicy.study.results import Results

    spec, path = read_study(study, quick=quick, out=out, batch=batch)
    spec = Overrides(model, dataset, data, samples, seeds, max_new_tokens).applied(spec)
    try:
        made = make_plan(spec, device)
    except UnreachableError as error:
        _print_outline(spec, error)
        return
    count = workers or default_workers(device)
    note = messages().status("probing" if probe else "counting")
    with Results(path) if path.is_file() else nullcontext() as results, note:
        size = measure(made, results, probe=probe, threads=max(1, cores() // count))
        older = "" if results is None else str(Asked.now(made, results).older(results))
    console = output()
    described = _variants(made.variants)
    widen(console, [described])
    console.print(described)
    longest = max(row.most for row in outline(spec))
    for found in made.models:
        stops = found.positions is not None and longest >= found.positions
        ends = f"; an answer ends at the last of its {found.positions:,} positions" if stops else ""
        console.print(f"{found.name} runs in {found.dtype} on {found.device}{ends}.", soft_wrap=True)
    console.print(_sized(size, count), soft_wrap=True)
    _say_older(console, older, path)


@study.command()
def run(
    study: Name,
    *,
    quick: Quick = False,
    out: Out = None,
    batch: Batch = None,
    workers: Workers = None,
    on: Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Address of the Ray cluster; one is started if left out.")] = None,
    device: Device = "auto",
    model: Models = None,
    dataset: Datasets = None,
    data: Data = None,
    samples: Samples = None,
    seeds: Seeds = None,
    max_new_tokens: NewTokens = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
) -> None:
    """Run a study, or what is left of it: every run is recorded as it finishes, and a killed study goes on."""
    from kvpolicy.cli.study_progress import Bar
    from kvpolicy.cli.terminal import messages
    from kvpolicy.study.extra import library
    from kvpolicy.study.results import Results
    from kvpolicy.study.runner import Runner

    spec, path = read_study(study, quick=quick, out=out, batch=batch)
    spec = Overrides(model, dataset, data, samples, seeds, max_new_tokens).applied(spec)
    library("scipy.stats", "the intervals of a study need")  # which come at the end, after hours maybe
    executor = _executor(on, address, workers, device)
    with executor:
        made = make_plan(spec, device)
        console = messages()
        with Results(path, spec.study) as results, Bar(console) as bar:
            try:
                Runner(made, results, executor, bar, retry_failed=retry_failed).run()
            except KeyboardInterrupt:
                bar.stop()
                text = f"Stopped. {path} holds what is finished; the same command goes on from there."
                console.print(text, soft_wrap=True)
                raise typer.Exit(130) from None
    _print_results(path, spec)


@study.command()
def status(study: Argument, *, quick: Quick = False, out: Out = None, device: Device = "auto") -> None:
    """Say how far a study is, what failed, and what else is in its file."""
    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.study.analysis import failures, summarise
    from kvpolicy.study.asked import Asked
    from kvpolicy.study.estimate import measure
    from kvpolicy.study.results import Results

    source = find(study, quick=quick, out=out, device=device)
    with Results(source.path) as results:
        if source.spec is None:
            asked, left = Asked.last(results), ""
            done = len(results.records(asked.keys, outputs=False))
            runs = len(asked.keys)
        else:
            made = make_plan(source.spec, device)
            with messages().status("counting"):
                size = measure(made, results, probe=False)
            asked = Asked.now(made, results)
            done, runs, left = size.done, size.runs, f"; about {size.tokens:,} tokens are left"
        rows, older = summarise(results, (), asked.cells), str(asked.older(results))
    console = output()
    # Variants that come to the same policy share their runs.
    failed = sum({row.cell.keys: row.failed for row in rows}.values())
    console.print(
        f"{source.path}: {done:,} of {runs:,} runs are recorded, {failed:,} of them failed{left}.",
        soft_wrap=True,
    )
    for reason, count in failures(rows).items():
        console.print(f"{count} failed: {reason}", soft_wrap=True)
    _say_older(console, older, source.path)


study.command()(report)
study.command()(budget)
study.command()(prune)


def _say_older(console: Console, older: str, path: Path) -> None:
    if older:
        console.print(f"{older}; `kvpolicy study prune {path}` removes them.", soft_wrap=True)


def _executor(on: str, address: str | None, workers: int | None, device: str) -> Executor:
    from kvpolicy.study.executors import Processes, Ray, default_workers

    if on == "ray":
        return Ray(address, workers, gpu=device.startswith("cuda"))
    if on != "local":
        raise KVPolicyError(f"--on: {on!r} is not known; write local or ray.")
    if address is not None:
        raise KVPolicyError("--address: is for Ray; write `--on ray` too.")
    return Processes(workers or default_workers(device))


def _variants(variants: Sequence[Variant]) -> Any:
    from rich.table import Table

    differs = [_not_in_its_name(variant) for variant in variants]
    table = Table("variant", "condition", *(("besides",) if any(differs) else ()), box=None, header_style="bold")
    for variant, more in zip(variants, differs, strict=True):
        table.add_row(variant.name, variant.condition, *((more,) if any(differs) else ()))
    return table


def _not_in_its_name(variant: Variant) -> str:
    """Return the settings of a variant that neither its name nor its condition says."""
    said = f", policy={variant.name}, {variant.name}, {variant.condition}, "
    settings = [f"{path}={value}" for path, value in variant.settings]
    return ", ".join(each for each in settings if f", {each}, " not in said)


def _print_outline(spec: StudySpec, error: UnreachableError) -> None:
    """Print how large a study is, as far as its file says it."""
    from rich.table import Table

    from kvpolicy.cli.terminal import messages, output, widen
    from kvpolicy.study.outline import outline

    console, rows = output(), outline(spec)
    listed = Table("dataset", "problems", "rollouts", "budget", "models", "runs", box=None, header_style="bold")
    for row in rows:
        numbers = (row.problems, row.rollouts, row.budget, row.models, row.runs)
        listed.add_row(row.dataset, *("" if number is None else f"{number:,}" for number in numbers))
    for table in (_variants(spec.variants()), listed):
        widen(console, [table])
        console.print(table)
    runs, tokens = sum(row.runs for row in rows), sum(row.tokens for row in rows)
    console.print(
        f"{len(spec.variants()):,} variants and the full cache, {runs:,} runs of at most {tokens:,} tokens on "
        f"{', '.join(spec.models)}.",
        soft_wrap=True,
    )
    messages().print(
        "These are counts from the study's file and the published sizes of its datasets. No time is estimated, because "
        f"something that the study names is not on this machine.\nNot here: {error}\n"
        "To plan or run it with what is here, name that with `--model`, `--dataset` and `--data`.",
        soft_wrap=True,
    )


def _sized(size: StudySize, workers: int) -> str:
    text = f"{size.variants:,} variants and the full cache, {size.runs:,} runs"
    if size.done:
        text += f", {size.done:,} of them recorded already"
    text += f"; about {size.tokens:,} tokens"
    if size.seconds is None:
        return f"{text}; no time was estimated, for nothing was run."
    return f"{text}, about {duration(size.seconds / workers)} with {workers} worker{'s' if workers > 1 else ''}."


def duration(seconds: float) -> str:
    """Return a time in words of a fitting size."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _print_results(path: Path, spec: StudySpec) -> None:
    from kvpolicy.cli.study_tables import tables
    from kvpolicy.cli.terminal import output
    from kvpolicy.study.analysis import cuts, failures, refusals, summarise
    from kvpolicy.study.asked import Asked
    from kvpolicy.study.results import Results

    with Results(path) as results:
        asked = Asked.last(results)  # it has just run
        rows, older = summarise(results, spec.metrics, asked.cells, study=asked.study), str(asked.older(results))
    console = output()
    for table, left_out in tables(rows, spec, console):
        console.print(table)
        if left_out:
            names = ", ".join(left_out)
            console.print(f"Not shown for lack of room: {names}; a wider terminal or the report has them.")
    for sentence in cuts(rows):
        console.print(sentence)
    for sentence in refusals(rows):
        console.print(sentence, soft_wrap=True)
    for reason, count in failures(rows).items():
        console.print(f"{count} failed: {reason}", soft_wrap=True)
    console.print(f"Recorded in {path}.", soft_wrap=True)
    _say_older(console, older, path)
