"""Trace pages of a study: what two policies kept of the texts that were recorded for one problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvpolicy.errors import KVPolicyError
from kvpolicy.spec import PolicySpec
from kvpolicy.study.models import load
from kvpolicy.study.records import CellRecord, Recorded, RunRecord
from kvpolicy.study.runs import Plan, with_seed
from kvpolicy.study.work import prompt_ids
from kvpolicy.trace.about import details, made
from kvpolicy.trace.page import Shown, trace_page
from kvpolicy.trace.pieces import pieces
from kvpolicy.trace.running import record_reading

if TYPE_CHECKING:
    from kvpolicy.study.models import ModelRef
    from kvpolicy.study.problem import Problem
    from kvpolicy.study.report.bundle import TraceWanted
    from kvpolicy.study.report.content import VariantEntry


def trace_pages(
    wanted: Sequence[TraceWanted], plan: Plan, results: Recorded, say: Callable[[str], None]
) -> dict[TraceWanted, str]:
    """Return a page for each problem that is wanted: the recorded texts, read again under their policies.

    Args:
        wanted: which problems, and under which two policies.
        plan: the study, whose models are here.
        results: what was recorded, with texts.
        say: called before each page with what it is.

    Raises:
        KVPolicyError: a model cannot be loaded, or the study compresses once, which a text that is read again does not
            show.
    """
    if any(variant.compress is not None for variant in plan.variants):
        raise KVPolicyError("with `compress` a prompt is compressed once, outside of what a trace reads.")
    models = {model.name: model for model in plan.models}
    keys = {key for each in wanted for entry in (each.effect.entry, each.effect.base) for key in entry.row.cell.keys}
    found = {record.key: record for record in results.records(keys, outputs=True)}
    pages = {}
    for each in wanted:
        say(f"trace of problem {each.number} of {each.place.dataset}")
        model = models[each.place.model]
        problem = _problem(plan, model, each)
        shown = [_shown(entry, model, problem, found) for entry in (each.effect.entry, each.effect.base)]
        same = shown[0].texts == shown[1].texts
        title = f"{model.name}, problem {each.number} of {each.place.dataset}"
        pages[each] = trace_page(shown, title, same_text=same, made=made(model.dtype))
    return pages


def _problem(plan: Plan, model: ModelRef, wanted: TraceWanted) -> Problem:
    source = next(source for source in plan.spec.datasets if source.label == wanted.place.dataset)
    of_seed = plan.problems(model, source).values()
    return next(each for problems in of_seed for each in problems if each.index == wanted.number)


def answer_of(cell: CellRecord, problem: int, found: Mapping[str, RunRecord]) -> RunRecord:
    """Return a variant's answer to a problem, of the first seed whose run did not fail.

    Args:
        cell: the variant, which answered the problem.
        problem: number of the problem.
        found: the runs by key, with texts.
    """
    runs = (found[key] for key in cell.keys if key in found)
    answers = [run for run in runs if (run.kind, run.problem, run.error) == ("generate", problem, None)]
    return min(answers, key=lambda run: run.seed)


def _shown(entry: VariantEntry, model: ModelRef, problem: Problem, found: Mapping[str, RunRecord]) -> Shown:
    cell = entry.row.cell
    record = answer_of(cell, problem.index, found)
    loaded, tokenizer = load(model)
    prompt = prompt_ids(tokenizer, problem)
    tokens = prompt + tokenizer(record.output, add_special_tokens=False)["input_ids"]
    policy = with_seed(PolicySpec(**cell.data), record.seed)
    recording = record_reading(loaded, tokens, len(prompt), policy.build())
    texts, special = pieces(tokenizer, tokens)
    return Shown(cell.name, cell.condition, texts, special, recording, details(policy))
