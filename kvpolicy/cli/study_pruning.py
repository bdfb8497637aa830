"""`kvpolicy study prune`: removes runs that the study does not ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpolicy.cli import study_source
from kvpolicy.cli.study_options import Device, Out, Quick
from kvpolicy.errors import KVPolicyError


def prune(
    study: study_source.Argument,
    *,
    quick: Quick = False,
    out: Out = None,
    device: Device = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Remove them without asking.")] = False,
) -> None:
    """Remove the runs of older settings from a results file: those that count in no table any more."""
    import sys

    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.odd_text import harmless
    from kvpolicy.study.results import Results
    from kvpolicy.study.runner import writing

    source = study_source.find(study, quick=quick, out=out, device=device)
    with Results(source.path) as results:
        asked, caution = source.asked(results)
        name, older = results.meta("study"), asked.older(results)
    console = output()
    if caution is not None:
        messages().print(caution, soft_wrap=True)
    if not older.keys:
        console.print(f"{source.path}: every run in it counts; there is nothing to remove.", soft_wrap=True)
        return
    console.print(f"{older}.", soft_wrap=True)
    if not yes:
        if not sys.stdin.isatty():
            raise KVPolicyError("prune: nobody can be asked here; write --yes to remove them.")
        if not typer.confirm(harmless(f"Remove them from {source.path}?"), default=False):
            raise typer.Exit(1)
    with writing(source.path), Results(source.path, name) as results:
        results.remove(older.keys)
    count = len(older.keys)
    console.print(f"{source.path}: {count:,} run{'' if count == 1 else 's'} removed.", soft_wrap=True)
