"""`kvpolicy study report`: a study's results as a page and as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.study_options import Out, Quick, read_study
from kvpolicy.errors import KVPolicyError

SUFFIXES = (".sqlite", ".sqlite3", ".db")

Source = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A registered study, a study file, or a results file (.sqlite).")
]


def report(
    study: Source,
    *,
    quick: Quick = False,
    out: Out = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; beside the results file if left out.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The Markdown; beside the results file if left out.")
    ] = None,
) -> None:
    """Write a study's results as a page of one file (HTML) and as Markdown: tables, plots, and all settings."""
    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.study.report import page
    from kvpolicy.study.report.content import Commands, build
    from kvpolicy.study.report.markdown import markdown as as_markdown
    from kvpolicy.study.results import Results

    path, ran = _results(study, quick=quick, out=out)
    html, markdown = html or path.with_suffix(".html"), markdown or path.with_suffix(".md")
    if len({each.resolve() for each in (path, html, markdown)}) < 3:
        raise KVPolicyError("--html, --markdown: the page, the Markdown and the results need three different files.")
    options: dict[str, Any] = {"--out": out, "--html": html, "--markdown": markdown}
    if html == path.with_suffix(".html"):
        del options["--html"]
    if markdown == path.with_suffix(".md"):
        del options["--markdown"]
    asked = _command("report", study, quick=quick, options=options)
    with Results(path) as results, messages().status("writing"):
        made = build(results, Commands(ran or _unknown(results, path), asked))
        _write("--html", html, lambda: page.html(made))
        _write("--markdown", markdown, lambda: as_markdown(made))
    output().print(f"Written: {html} and {markdown}.", markup=False)


def _results(study: str, *, quick: bool, out: Path | None) -> tuple[Path, str | None]:
    """Return the results file, and the command that makes it if the study was named."""
    if not study.endswith(SUFFIXES):
        _, path = read_study(study, quick=quick, out=out)
        return path, _command("run", study, quick=quick, options={"--out": out})
    if quick or out is not None:
        option = "--quick" if quick else "--out"
        raise KVPolicyError(f"{option}: {study} is a results file already; leave {option} out.")
    return Path(study), None


def _unknown(results: Any, path: Path) -> str:
    """Return the command for a study of which only the results are known: its file is among the settings."""
    return _command("run", f"{results.meta('study')}.yaml", quick=False, options={"--out": path})


def _command(name: str, study: str, *, quick: bool, options: dict[str, Any]) -> str:
    words = ["kvpolicy", "study", name, study, *(["--quick"] if quick else [])]
    for option, value in options.items():
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)


def _write(option: str, path: Path, make: Callable[[], str]) -> None:
    text = make()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise KVPolicyError(f"{option}: {path} cannot be written ({error.strerror}); name another file.") from None
