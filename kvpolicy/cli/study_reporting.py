"""`kvpolicy study report`: a study's results as a page and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvpolicy.cli import study_source
from kvpolicy.cli.study_options import Device, Out, Quick
from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from kvpolicy.study.asked import Asked
    from kvpolicy.study.records import Recorded
    from kvpolicy.study.report.bundle import TraceWanted
    from kvpolicy.study.report.content import Commands, Report

_TRACES: Final = 6


def report(
    study: study_source.PublishedArgument,
    *,
    quick: Quick = False,
    out: Out = None,
    device: Device = "auto",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; beside the results file if left out.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The Markdown; beside the results file if left out.")
    ] = None,
    publish: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Instead of these, for a repository: Markdown, pictures (SVG) and a file of all numbers.",
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Instead of these, for a web server: report, problems, traces and data in one folder."
        ),
    ] = None,
    traces: Annotated[
        int, typer.Option(min=0, metavar="N", help="Trace pages of a bundle at most; the model reads for each.")
    ] = _TRACES,
) -> None:
    """Write a study's results as a page of one file (HTML) and as Markdown: tables, plots, and all settings."""
    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.study.report.content import Commands

    source = study_source.find(study, quick=quick, out=out, device=device, published=True)
    targets = _Targets.of(source, html, markdown, publish, bundle)
    options: dict[str, Any] = {
        "--out": out,
        "--html": html,
        "--markdown": markdown,
        "--publish": publish,
        "--bundle": bundle,
        "--traces": traces if bundle is not None and traces != _TRACES else None,
    }
    again = study_source.command("report", study, quick=quick, options=targets.said(source, options))
    note, console = messages(), output()
    with source.opened() as results, note.status("writing"):
        asked, caution = source.asked(results)
        made, written = targets.write(results, asked, Commands(source.run_command(results), again))
        if bundle is not None:
            written.append(_bundle(source, results, asked, made, bundle, traces))
    if caution is not None:
        note.print(caution, soft_wrap=True)
    console.print(f"Written: {' and '.join(filter(None, (', '.join(written[:-1]), written[-1])))}.", soft_wrap=True)
    if made.older:
        console.print(f"{made.older}; `kvpolicy study prune {source.path}` removes them.", soft_wrap=True)


@dataclass(frozen=True)
class _Targets:
    """What is written: each None if it is not."""

    html: Path | None
    markdown: Path | None
    publish: Path | None

    @classmethod
    def of(
        cls,
        source: study_source.StudySource,
        html: Path | None,
        markdown: Path | None,
        publish: Path | None,
        bundle: Path | None,
    ) -> _Targets:
        """Return what is asked for; raises KVPolicyError if two of it are one file."""
        page, text = _beside(source.path)
        if publish is None and bundle is None:
            # The Markdown of a published study lies beside it already, with pictures.
            html, markdown = html or page, markdown or (None if source.published else text)
        files = [each.resolve() for each in (source.path, html, markdown) if each is not None]
        if len(set(files)) < len(files):
            raise KVPolicyError(
                "--html, --markdown: the page, the Markdown and the results need three different files."
            )
        return cls(html, markdown, publish)

    def said(self, source: study_source.StudySource, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options that are not what they are without being written."""
        usual = dict(zip(("--html", "--markdown"), _beside(source.path), strict=True))
        return {name: value for name, value in options.items() if value != usual.get(name)}

    def write(self, results: Recorded, asked: Asked, commands: Commands) -> tuple[Report, list[str]]:
        """Write everything; return the report, and what was written."""
        from kvpolicy.outputs import replace_file
        from kvpolicy.study.report import page
        from kvpolicy.study.report.content import build
        from kvpolicy.study.report.markdown import markdown as as_markdown
        from kvpolicy.study.report.publishing import publish

        written = []
        made = build(results, commands, asked)
        texts = {
            "--html": (self.html, page.html(made) if self.html is not None else ""),
            "--markdown": (self.markdown, as_markdown(made) if self.markdown is not None else ""),
        }
        for option, (path, text) in texts.items():
            if path is not None:
                replace_file(path, text, option)
                written.append(str(path))
        if self.publish is not None:
            files = publish(results, asked, commands, self.publish, "--publish")
            written += [str(files.markdown), str(files.data), f"{len(files.pictures)} pictures beside them"]
        return made, written


def _bundle(
    source: study_source.StudySource, results: Recorded, asked: Asked, made: Report, folder: Path, most: int
) -> str:
    """Write the folder and return what it is, in words."""
    from kvpolicy.cli.terminal import messages
    from kvpolicy.study.report.bundle import traces_wanted, write_bundle

    note = messages()
    wanted = traces_wanted(made, most) if not source.published else []
    pages: dict[TraceWanted, str] = {}
    if wanted and source.spec is None:
        note.print("No traces: name the study, not its results file, for its models have to read.", soft_wrap=True)
    elif wanted and source.spec is not None:
        from kvpolicy.trace.bundled import trace_pages

        try:
            plan = study_source.make_plan(source.spec, source.device)
            pages = trace_pages(wanted, plan, results, lambda text: note.print(f"{text}.", soft_wrap=True))
        except KVPolicyError as error:
            note.print(f"No traces: {error}", soft_wrap=True)
    files = write_bundle(results, asked, made, folder, pages, "--bundle")
    return f"{files[0]} with {len(files) - 1:,} other files in {folder}"


def _beside(path: Path) -> tuple[Path, Path]:
    """Return where the page and the Markdown of a results file are, if nothing else is said."""
    if path.name.endswith(study_source.PUBLISHED):
        path = path.with_name(path.name.removesuffix(study_source.PUBLISHED) + ".x")
    return path.with_suffix(".html"), path.with_suffix(".md")
