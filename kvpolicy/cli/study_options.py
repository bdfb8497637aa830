"""What the commands of `kvpolicy study` share: the study, its small version, its results file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from kvpolicy.study.spec import StudySpec

Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A registered study, or a study file.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small version, as the study's `quick` says.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="The results file; STUDY.sqlite if left out.")]


def read_study(name: str, *, quick: bool, out: Path | None, batch: int | None = None) -> tuple[StudySpec, Path]:
    """Return the study and its results file.

    Args:
        name: a registered study, or the path of its file.
        quick: its small version.
        out: the results file; one named after the study if None.
        batch: rows that run together; what the study says if None.

    Raises:
        KVPolicyError: there is no such study, it is wrong, or the folder of `out` is not there.
    """
    from kvpolicy.study.spec import find_study

    spec = find_study(name)
    path = out or Path(f"{spec.study}{'-quick' if quick else ''}.sqlite")
    if quick:
        spec = spec.quickened()
    if batch is not None:
        spec = spec.model_copy(update={"batch": batch})
    if out is not None and not out.resolve().parent.is_dir():
        raise KVPolicyError(f"--out: there is no folder {out.resolve().parent}; make it first.")
    return spec, path
