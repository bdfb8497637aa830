"""A study for a repository: Markdown with pictures, and the numbers from which its page is made again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvpolicy.errors import KVPolicyError
from kvpolicy.outputs import replace_file
from kvpolicy.study.asked import Asked
from kvpolicy.study.portable import short_command, short_paths
from kvpolicy.study.published import SUFFIX, Published, published
from kvpolicy.study.records import Recorded
from kvpolicy.study.report.content import Commands, Measure, Place, Report, build
from kvpolicy.study.report.drawing import Plot
from kvpolicy.study.report.forest import forest_plot
from kvpolicy.study.report.markdown import Picture, markdown
from kvpolicy.study.report.plots import budget_plots, front_plot


@dataclass(frozen=True)
class PublishedFiles:
    """What was written.

    Attributes:
        markdown: tables and pictures.
        data: the numbers.
        pictures: SVG files, in a folder of the study's name.
        report: what the Markdown says.
    """

    markdown: Path
    data: Path
    pictures: tuple[Path, ...]
    report: Report


def publish(results: Recorded, asked: Asked, commands: Commands, folder: Path, option: str = "") -> PublishedFiles:
    """Write `NAME.md`, `NAME.json.gz` and `NAME/*.svg` into a folder; the Markdown is made of what is in the data.

    Args:
        results: what was recorded.
        asked: what the study asks for.
        commands: how all of this is made again.
        folder: where to; it is made if it is not there. Pictures of the study that lie there already are replaced.
        option: what errors begin with.

    Raises:
        KVPolicyError: the folder cannot be written.
    """
    name = results.meta("study") or "study"
    beside = folder / name
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        begin = f"{option}: {beside}" if option else str(beside)
        raise KVPolicyError(f"{begin} cannot be made ({error.strerror}); name another folder.") from None
    data = folder / f"{name}{SUFFIX}"
    replace_file(data, published(results, asked, commands.run), option)
    read = Published(data)
    again = short_command(commands.report, short_paths(asked.study))
    report = build(read, replace(commands, run=read.meta("command") or "", report=again), Asked.last(read))
    shown: dict[tuple[str, str, str], list[Picture]] = {}
    written = []
    for key, file, plot in pictures(report):
        replace_file(beside / file, plot.file(), option)
        shown.setdefault(key, []).append(Picture(f"{name}/{file}", plot.title))
        written.append(beside / file)
    for old in set(beside.glob("*.svg")) - set(written):
        old.unlink()
    text = folder / f"{name}.md"
    replace_file(text, markdown(report, shown, data.name), option)
    return PublishedFiles(text, data, tuple(written), report)


def pictures(report: Report) -> Iterator[tuple[tuple[str, str, str], str, Plot]]:
    """Yield the pictures of a report: model, dataset and metric, the name of a file, and what is in it."""
    taken: set[str] = set()
    for place in report.places:
        for measure in place.measures:
            for words, plot in _plots(report, place, measure):
                yield (place.model, place.dataset, measure.metric), _file(words, taken), plot


def _plots(report: Report, place: Place, measure: Measure) -> Iterator[tuple[str, Plot]]:
    """Yield the pictures of a measure with the words that their files are called by.

    They are the plots against the budget, where budgets are compared, and otherwise the differences; for the first
    measure also the plot against bytes.
    """
    where = [place.dataset, *([place.model] if len({each.model for each in report.places}) > 1 else [])]

    def called(*words: str) -> str:
        return "-".join((*where, measure.metric, *words))

    if report.budgets is not None and place.facets:
        for pair in budget_plots(report, place, measure, "plot"):
            yield called("budget", pair.wide.caption), pair.wide
    else:
        for condition, effects in measure.effects.items():
            yield (
                called("differences", condition),
                forest_plot(report, effects, "plot", f"{place.dataset}, {condition}"),
            )
    if measure is place.measures[0] and len(measure.front) + len(measure.beaten) > 1:
        yield called("bytes"), front_plot(report, place, measure, "plot").wide


def _file(words: str, taken: set[str]) -> str:
    """Return the name of a picture's file and take it: names that differ in signs or case alone get numbers."""
    slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    found = next(name for i in itertools.count(1) if (name := slug if i == 1 else f"{slug}-{i}") not in taken)
    taken.add(found)
    return f"{found}.svg"
