"""What prompts of benchmarks have in common: their places, the middle that is left out, the fields that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.source import TextMeasure


def require_published(found: Sequence[str], wanted: Sequence[str], where: str, benchmark: str) -> None:
    """Raise KVPolicyError if rows lack a field of the published format."""
    missing = [name for name in wanted if name not in found]
    if missing:
        listed = ", ".join(map(repr, missing))
        raise KVPolicyError(
            f"datasets: {where} has no {'field' if len(missing) == 1 else 'fields'} {listed}, which {benchmark} has "
            "as it "
            f"is published; its fields are {', '.join(found) or 'none'}; name a copy in the published format."
        )


def filled(template: str, values: Mapping[str, str]) -> tuple[str, int]:
    """Return a template with its places filled, and where what follows the context begins, in characters.

    What is put in may have braces in it: places are looked for in the template alone.
    """
    made, question_at, rest = "", 0, template
    while rest:
        places = [(at, name) for name in values if (at := rest.find("{" + name + "}")) >= 0]
        if not places:
            return made + rest, question_at
        at, name = min(places)
        made += rest[:at] + values[name]
        rest = rest[at + len(name) + 2 :]
        if name == "context":
            question_at = len(made)
    return made, question_at


def cut_middle(
    prompt: str, question_at: int, measure: TextMeasure | None, most: int | None, answer: int, *, chat: bool | None
) -> tuple[str, int]:
    """Return a prompt without its middle if it is too long, as LongBench does it, and where its question begins then.

    The first and the last half of the tokens that may stay are decoded and put together.

    Args:
        prompt: the prompt.
        question_at: where its question begins, in characters.
        measure: of the model; None leaves the prompt as it is.
        most: tokens that may stay; what the model's window leaves beside answer and chat template if None.
        answer: tokens of the answer.
        chat: as in `Problem`.

    Raises:
        KVPolicyError: the model's window is too short for any prompt.
    """
    if measure is None:
        return prompt, question_at
    if most is None:
        if measure.window is None:
            return prompt, question_at
        most = measure.window - answer - measure.frame(chat=chat) - 2  # where the halves meet there may be one more
        if most < 2:
            raise KVPolicyError(
                f"datasets: an answer of {answer} tokens leaves no room for a prompt in the {measure.window} tokens "
                "that "
                "the model takes; write fewer `max_new_tokens`."
            )
    tokens = measure.tokenizer(prompt)["input_ids"]
    if len(tokens) <= most:
        return prompt, question_at
    half = most // 2
    begin, end = (measure.tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:half], tokens[-half:]))
    # From the end on nothing has moved, unless the question itself lost its beginning.
    return begin + end, max(len(begin), len(begin) + len(end) - (len(prompt) - question_at))


def labelled(use: str, known: Sequence[str], chosen: Sequence[str]) -> str:
    """Return what tables call some tasks of a benchmark."""
    if len(chosen) == len(known):
        return use
    return f"{use}-{chosen[0]}" if len(chosen) == 1 else f"{use}-{len(chosen)}-tasks"
