"""`kvpolicy study`: plan, run and look at studies."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.study_options import Name, Out, Quick, read_study
from kvpolicy.cli.study_reporting import report
from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from kvpolicy.study.estimate import Size
    from kvpolicy.study.executors import Executor
    from kvpolicy.study.plan import Plan
    from kvpolicy.study.spec import StudySpec

study = typer.Typer(
    help="Ablation studies: what is one component, budget or protection worth?",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

study.command()(report)

Batch = Annotated[int | None, typer.Option(min=1, help="Rows that run together; does not change results.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Workers = Annotated[int | None, typer.Option(min=1, help="Local processes, or tasks on Ray at the same time.")]


@study.command()
def plan(
    study: Name,
    *,
    quick: Quick = False,
    out: Out = None,
    batch: Batch = None,
    workers: Workers = None,
    device: Device = "auto",
    probe: Annotated[bool, typer.Option(help="Time a few tokens, to estimate how long it takes.")] = True,
) -> None:
    """Say how many variants, runs and tokens a study has, and about how long it takes; nothing is recorded."""
    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.study.estimate import measure
    from kvpolicy.study.executors import cores, default_workers
    from kvpolicy.study.results import Results

    spec, path = read_study(study, quick=quick, out=out, batch=batch)
    made = _plan(spec, device)
    count = workers or default_workers(device)
    note = messages().status("probing" if probe else "counting")
    with Results(path) if path.is_file() else nullcontext() as results, note:
        size = measure(made, results, probe=probe, threads=max(1, cores() // count))
    console = output()
    console.print(_described(made))
    console.print(_sized(size, count))


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
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
) -> None:
    """Run a study, or what is left of it: every run is recorded as it finishes, and a killed study goes on."""
    from kvpolicy.cli.study_progress import Bar
    from kvpolicy.cli.terminal import messages
    from kvpolicy.study.results import Results
    from kvpolicy.study.runner import Runner

    spec, path = read_study(study, quick=quick, out=out, batch=batch)
    executor = _executor(on, address, workers, device)
    with executor:
        made = _plan(spec, device)
        console = messages()
        with Results(path, spec.study) as results, Bar(console) as bar:
            try:
                Runner(made, results, executor, bar, retry_failed=retry_failed).run()
            except KeyboardInterrupt:
                bar.stop()
                console.print(f"Stopped. {path} holds what is finished; the same command goes on from there.")
                raise typer.Exit(130) from None
    _print_results(path, spec)


@study.command()
def status(study: Name, *, quick: Quick = False, out: Out = None, device: Device = "auto") -> None:
    """Say how far a study is, and what failed."""
    from kvpolicy.cli.terminal import output
    from kvpolicy.study.analysis import failures, summarise
    from kvpolicy.study.estimate import measure
    from kvpolicy.study.results import Results

    spec, path = read_study(study, quick=quick, out=out, batch=None)
    with Results(path) as results:
        size = measure(_plan(spec, device), results, probe=False)
        rows = summarise(results, ())
    console = output()
    failed = sum(row.failed for row in rows)
    console.print(
        f"{path}: {size.done:,} of {size.runs:,} runs are recorded, {failed:,} of them failed; "
        f"about {size.tokens:,} tokens are left."
    )
    for reason, count in failures(rows).items():
        console.print(f"{count} failed: {reason}", markup=False)


def _plan(spec: StudySpec, device: str) -> Plan:
    from kvpolicy.cli.terminal import messages
    from kvpolicy.study.models import find_model
    from kvpolicy.study.plan import Plan

    say = messages()
    return Plan(spec, [find_model(name, spec.dtype, device, say.print) for name in spec.models])


def _executor(on: str, address: str | None, workers: int | None, device: str) -> Executor:
    from kvpolicy.study.executors import Processes, Ray, default_workers

    if on == "ray":
        return Ray(address, workers, gpu=device.startswith("cuda"))
    if on != "local":
        raise KVPolicyError(f"--on: {on!r} is not known; write local or ray.")
    if address is not None:
        raise KVPolicyError("--address: is for Ray; write `--on ray` too.")
    return Processes(workers or default_workers(device))


def _described(plan: Plan) -> Any:
    from rich.table import Table

    table = Table("variant", "condition", "what differs", box=None, header_style="bold")
    for variant in plan.variants:
        table.add_row(variant.name, variant.condition, ", ".join(f"{path}={value}" for path, value in variant.settings))
    return table


def _sized(size: Size, workers: int) -> str:
    text = f"{size.variants:,} variants and the full cache, {size.runs:,} runs"
    if size.done:
        text += f", {size.done:,} of them recorded already"
    text += f"; about {size.tokens:,} tokens"
    if size.seconds is None:
        return f"{text}."
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
    from kvpolicy.cli.terminal import output, widen
    from kvpolicy.study.analysis import failures, summarise
    from kvpolicy.study.results import Results

    with Results(path) as results:
        rows = summarise(results, spec.metrics)
    console = output()
    made = list(tables(rows, spec))
    widen(console, made)
    for table in made:
        console.print(table)
    for reason, count in failures(rows).items():
        console.print(f"{count} failed: {reason}", markup=False)
    console.print(f"Recorded in {path}.", markup=False)
