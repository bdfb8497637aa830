"""`kvpolicy study report`: a study's results as a page and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli import study_source
from kvpolicy.cli.study_options import Device, Out, Quick
from kvpolicy.errors import KVPolicyError


def report(
    study: study_source.Argument,
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
) -> None:
    """Write a study's results as a page of one file (HTML) and as Markdown: tables, plots, and all settings."""
    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.outputs import replace_file
    from kvpolicy.study.report import page
    from kvpolicy.study.report.content import Commands, build
    from kvpolicy.study.report.markdown import markdown as as_markdown
    from kvpolicy.study.results import Results

    source = study_source.find(study, quick=quick, out=out, device=device)
    path = source.path
    html, markdown = html or path.with_suffix(".html"), markdown or path.with_suffix(".md")
    if len({each.resolve() for each in (path, html, markdown)}) < 3:
        raise KVPolicyError("--html, --markdown: the page, the Markdown and the results need three different files.")
    options: dict[str, Any] = {"--out": out, "--html": html, "--markdown": markdown}
    if html == path.with_suffix(".html"):
        del options["--html"]
    if markdown == path.with_suffix(".md"):
        del options["--markdown"]
    again = study_source.command("report", study, quick=quick, options=options)
    note = messages()
    with Results(path) as results, note.status("writing"):
        asked, caution = source.asked(results)
        made = build(results, Commands(source.run_command(results), again), asked)
        texts = {html: page.html(made), markdown: as_markdown(made)}
        replace_file(html, texts[html], "--html")
        replace_file(markdown, texts[markdown], "--markdown")
    if caution is not None:
        note.print(caution, soft_wrap=True)
    output().print(f"Written: {html} and {markdown}.", soft_wrap=True)
    if made.older:
        output().print(f"{made.older}; `kvpolicy study prune {path}` removes them.", soft_wrap=True)
