"""`kvpolicy check`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from kvpolicy.testing.checking import ProfileName, Result, Subject

_MARKS = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "undecided": ("?", "bold yellow"),
    "not applicable": ("–", "dim"),
}
_JOBS = min(8, os.cpu_count() or 1)
_LONGEST_REASON = 300
_FEW = 4  # subjects that get a column each
_LAWS_AND_REASONS = 48  # columns of the terminal for the names of laws and for why one does not apply


def check(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPEC|COMPONENT|PACKAGE",
            help="A policy's name or file, a component (key_norm, importance.none, my_package.module:MyScorer), "
            "or an installed package.",
        ),
    ] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="Everything that is registered.")] = False,
    profile: Annotated[
        str,
        typer.Option(
            metavar="brief|quick|thorough", help="5 or 20 examples per law, always the same; or 1000 new ones."
        ),
    ] = "quick",
    law: Annotated[list[str] | None, typer.Option(help="Only this law; may be given several times.")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes; one per core, at most 8, by default.")
    ] = _JOBS,
) -> None:
    """Check components and policies against the laws (docs/laws.md); exit code 1 if one is broken or undecided."""
    chosen = _profile(profile)
    if bool(targets) == all_:
        raise typer.BadParameter("name a policy, a component or a package, or write --all.", param_hint="check")
    _require_laws()
    from kvpolicy.testing.checking import subjects_of_package

    subjects = subjects_of_package(None) if all_ else [s for target in targets or [] for s in _subjects(target)]
    once = list({subject.name: subject for subject in subjects}.values())
    if _report(_run(once, chosen, law or [], jobs)):
        raise typer.Exit(1)


def _require_laws() -> None:
    """Raise KVPolicyError in an installation without the laws' library."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.testing._extra import require_hypothesis

    try:
        require_hypothesis()
    except ImportError as error:
        raise KVPolicyError(f"check: {error}") from None


def _profile(name: str) -> ProfileName:
    known: tuple[Literal["brief"], Literal["quick"], Literal["thorough"]] = ("brief", "quick", "thorough")
    for profile in known:
        if name == profile:
            return profile
    raise typer.BadParameter(f"{name!r} is not a profile; write brief, quick or thorough.", param_hint="--profile")


def _subjects(target: str) -> list[Subject]:
    """Find what a name means: all policies, components and packages that are called so, a file, or a class."""
    import kvpolicy
    from kvpolicy.contracts.components import KINDS
    from kvpolicy.errors import KVPolicyError, did_you_mean
    from kvpolicy.loading.entries import same_package
    from kvpolicy.loading.presses import lead
    from kvpolicy.testing.checking import subject_of, subjects_of_package

    if ":" in target and not Path(target).exists():
        return [_class(target)]
    catalog = kvpolicy.catalog()
    kind, _, name = target.rpartition(".")
    found = [
        subject_of(entry.component, f"{entry.kind}.{entry.name}")
        for entry in catalog.entries()
        if entry.name == target or (entry.kind, entry.name) == (kind, name)
    ]
    policies = {entry.name for entry in catalog.policies()}
    if target in policies or "/" in target or target.endswith((".yaml", ".yml")):
        found.append(subject_of(kvpolicy.load(target), target))
    packages = {e.origin.distribution for e in catalog.entries()} | {p.origin.distribution for p in catalog.policies()}
    if any(same_package(target, each) for each in packages):
        found += subjects_of_package(target)
    if found:
        return found
    try:
        return [subject_of(kvpolicy.load(target), target)]  # a file in one of the policy folders
    except KVPolicyError:
        names = {entry.name for entry in catalog.entries()} | policies | packages
        near = f" {lead(target)}".rstrip() or did_you_mean(target, names)
        ask = f" Kinds are {', '.join(KINDS)}." if kind else ""
        raise typer.BadParameter(
            f"{target!r} is no registered policy or component, no policy file and no installed package that registers "
            f"any.{near}{ask} See kvpolicy list.",
            param_hint="check",
        ) from None


def _class(target: str) -> Subject:
    """Import ``module:Class``."""
    from kvpolicy.testing.checking import subject_of

    module, _, name = target.partition(":")
    try:
        return subject_of(getattr(import_module(module), name), target)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise typer.BadParameter(f"{target!r} cannot be checked: {reason}", param_hint="check") from error


def _run(subjects: Sequence[Subject], profile: ProfileName, names: Sequence[str], jobs: int = 1) -> list[Result]:
    """Check all subjects with a progress bar on standard error, in `jobs` processes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from kvpolicy.cli.terminal import messages, text_column
    from kvpolicy.errors import did_you_mean
    from kvpolicy.testing.checking import check as check_subject
    from kvpolicy.testing.laws import LAWS

    for name in names:
        if name not in LAWS:
            known = did_you_mean(name, LAWS) or f" The laws are {', '.join(LAWS)}."
            raise typer.BadParameter(f"there is no law {name!r}.{known}", param_hint="--law")
        if not any(s.error or s.kind in LAWS[name].kinds for s in subjects):
            about = ", ".join(LAWS[name].kinds)
            raise typer.BadParameter(
                f"{name} is about {about}, and nothing of that is checked; leave it out.", param_hint="--law"
            )
    chosen = {s.name: [law for law in s.laws if not names or law.name in names] for s in subjects}
    jobs = min(jobs, len(subjects))
    results: list[Result] = []
    console = messages()
    columns = (text_column("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(len(laws) for laws in chosen.values()))
        if jobs > 1:
            # New processes, for OpenMP does not survive a fork.
            with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
                work = [(s, profile, [law.name for law in chosen[s.name]]) for s in subjects]
                for subject, found in zip(subjects, pool.map(_checked, work), strict=True):
                    progress.update(task, description=subject.name, advance=len(chosen[subject.name]))
                    results += found
            return results
        for subject in subjects:
            progress.update(task, description=subject.name)
            results += check_subject(
                subject, profile, laws=chosen[subject.name], done=lambda _result: progress.advance(task)
            )
    return results


def _checked(work: tuple[Subject, ProfileName, list[str]]) -> list[Result]:
    """Check one subject in a process of its own."""
    from kvpolicy.testing.checking import check as check_subject
    from kvpolicy.testing.laws import LAWS

    subject, profile, laws = work
    return check_subject(subject, profile, laws=[LAWS[name] for name in laws])


def _report(results: Sequence[Result]) -> bool:
    """Print the table, the failures and a summary; return whether there are failures."""
    from rich.text import Text

    from kvpolicy.cli.terminal import output
    from kvpolicy.testing.checking import BAD

    console = output()
    subjects = list(dict.fromkeys(r.subject for r in results))
    laws = list(dict.fromkeys(r.law for r in results))
    found = {(r.law, r.subject): r for r in results}
    if len(subjects) <= _FEW:
        # Where the names would squeeze the laws, columns are numbered.
        wide = sum(len(subject) + 2 for subject in subjects) > console.width - _LAWS_AND_REASONS
        heads = [str(number) for number in range(1, len(subjects) + 1)] if wide and len(subjects) > 1 else subjects
        if heads is not subjects:
            for head, subject in zip(heads, subjects, strict=True):
                console.print(Text.assemble((head, "bold"), f" {subject}"), soft_wrap=True)
        console.print(_by_law(laws, subjects, heads, found))
    else:
        console.print(_by_subject(laws, subjects, found))
    if len(subjects) > _FEW:
        for number, law in enumerate(laws, 1):
            console.print(Text.assemble((f"{number:>3}", "dim"), f" {law:<28}"), end="\n" if number % 3 == 0 else "")
        console.print("\n" if len(laws) % 3 else "")
    bad = [r for r in results if r.status in BAD]
    for result in bad:
        console.rule(Text(f"{result.subject} · {result.law}", "bold red"))
        console.print(str(result), soft_wrap=True)
    counts = {status: sum(r.status == status for r in results) for status in _MARKS}
    seconds = sum(r.seconds for r in results)
    console.print(
        f"{len(subjects)} checked against {len(laws)} laws: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['undecided']} undecided, {counts['not applicable']} not applicable; "
        f"{seconds:.0f} s, summed over workers."
    )
    return bool(bad)


def _mark(result: Result | None) -> Text:
    from rich.text import Text

    return Text() if result is None else Text(*_MARKS[result.status])


def _by_law(
    laws: Sequence[str], subjects: Sequence[str], heads: Sequence[str], found: dict[tuple[str, str], Result]
) -> Table:
    """Return a table with a row per law, a column per subject, and why a law does not apply."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("law", no_wrap=True)
    for head in heads:
        table.add_column(head)
    table.add_column("", overflow="fold")
    for law in laws:
        results = [found.get((law, subject)) for subject in subjects]
        why = dict.fromkeys(r.reason for r in results if r is not None and r.reason)
        table.add_row(law, *map(_mark, results), Text("; ".join(why), "dim"))
    return table


def _by_subject(laws: Sequence[str], subjects: Sequence[str], found: dict[tuple[str, str], Result]) -> Table:
    """Return a table with a row per subject and a numbered column per law."""
    from rich.table import Table

    table = Table("", box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    for number in range(1, len(laws) + 1):
        table.add_column(f"{number // 10 or ' '}\n{number % 10}", justify="center")
    for subject in subjects:
        table.add_row(subject, *(_mark(found.get((law, subject))) for law in laws))
    return table
