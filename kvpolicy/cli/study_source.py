"""The study or the results file that a command is about, and what is asked for there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvpolicy.cli.study_options import read_study
from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from kvpolicy.study.asked import Asked
    from kvpolicy.study.records import Recorded
    from kvpolicy.study.runs import Plan
    from kvpolicy.study.spec import StudySpec

SUFFIXES: Final = (".sqlite", ".sqlite3", ".db")
PUBLISHED: Final = ".json.gz"

Argument = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A registered study, a study file, or a results file (.sqlite).")
]


PublishedArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE", help="A registered study, a study file, a results file, or a published one (.json.gz)."
    ),
]


@dataclass(frozen=True)
class StudySource:
    """What a command was given.

    Attributes:
        given: the argument.
        path: the results file, or the published one.
        spec: the study; None if the file was named.
        device: where its models run.
        quick, out: the options.
    """

    given: str
    path: Path
    spec: StudySpec | None
    device: str
    quick: bool
    out: Path | None

    @property
    def published(self) -> bool:
        """Whether it is a published file, which has numbers and no texts."""
        return self.given.endswith(PUBLISHED)

    @contextmanager
    def opened(self) -> Iterator[Recorded]:
        """Give what was recorded; raises KVPolicyError if it cannot be read."""
        from kvpolicy.study.published import Published
        from kvpolicy.study.results import Results

        if self.published:
            yield Published(self.path)
            return
        with Results(self.path) as results:
            yield results

    def asked(self, results: Recorded) -> tuple[Asked, str | None]:
        """Return what the study asks for as it is now, and a sentence if that can only be said as of its last run.

        Raises:
            KVPolicyError: the study's file has changed since, and its models or data sets are not here.
        """
        from kvpolicy.study.asked import Asked
        from kvpolicy.study.results import Results

        if self.spec is None or not isinstance(results, Results):
            return Asked.last(results), None
        try:
            return Asked.now(make_plan(self.spec, self.device), results), None
        except KVPolicyError as error:
            last = Asked.last(results)
            if _what(last.study) != _what(plain(self.spec)):
                raise KVPolicyError(
                    f"{self.given}: is not the study that {self.path} holds, and what it asks for now cannot be said "
                    f"({str(error).rstrip('.')}); name {self.path} itself, which holds the study as it ran last."
                ) from error
            reason = " ".join(str(error).split()).rstrip(".")
            return last, f"{self.given}: is taken as it ran last, for its models or data sets are not here ({reason})."

    def run_command(self, results: Recorded) -> str:
        """Return the command that makes the results."""
        if self.published:
            return results.meta("command") or ""
        if self.spec is not None:
            return command("run", self.given, quick=self.quick, options={"--out": self.out})
        return command("run", f"{results.meta('study')}.yaml", quick=False, options={"--out": self.path})


def find(given: str, *, quick: bool, out: Path | None, device: str = "auto", published: bool = False) -> StudySource:
    """Return what an argument names.

    Args:
        given: the argument.
        quick, out: the options.
        device: where models run.
        published: whether the command takes a published file too.

    Raises:
        KVPolicyError: there is no such study, or the command does not take such a file.
    """
    if given.endswith(PUBLISHED) and not published:
        raise KVPolicyError(
            f"{given}: is a published file, which only `report` and `budget` read; name a results file."
        )
    if not given.endswith((*SUFFIXES, PUBLISHED)):
        spec, path = read_study(given, quick=quick, out=out)
        return StudySource(given, path, spec, device, quick, out)
    if quick or out is not None:
        option = "--quick" if quick else "--out"
        raise KVPolicyError(f"{option}: {given} is a results file already; leave {option} out.")
    return StudySource(given, Path(given), None, device, quick, out)


def command(name: str, study: str, *, quick: bool, options: dict[str, Any]) -> str:
    """Return a command of `kvpolicy study` as one would type it."""
    words = ["kvpolicy", "study", name, study, *(["--quick"] if quick else [])]
    for option, value in options.items():
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)


def make_plan(spec: StudySpec, device: str) -> Plan:
    """Return the runs of a study; raises KVPolicyError if its models or data sets are not here."""
    from kvpolicy.cli.terminal import messages
    from kvpolicy.runtimes.opening import announce_hub
    from kvpolicy.study.models import find_model
    from kvpolicy.study.runs import Plan

    say = messages().print
    models = [find_model(name, spec.dtype, device, say) for name in spec.models]
    for source in spec.datasets:
        if source.remote is not None:
            announce_hub(f"datasets: {source.remote} is on the hub", say)
    return Plan(spec, models)


def _what(study: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a study asks for: how many rows run together is not part of it, nor what it leaves open."""
    return {name: value for name, value in study.items() if name != "batch" and value is not None}


def plain(spec: StudySpec) -> dict[str, Any]:
    """Return the fields of a study as a results file gives them back."""
    data: dict[str, Any] = json.loads(json.dumps(spec.to_data()))
    return data
