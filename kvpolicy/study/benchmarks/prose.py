"""Essay-like prose and words of our own, for texts in which something is hidden.

The prose is put together from patterns of sentences, always the same from its beginning, and never ends; it reads like
the essays of no one. It is no natural text: for one, name a file as `text`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.dataset_rows import existing


def _listed(kind: str) -> tuple[str, ...]:
    text = resources.files("kvpolicy.study.benchmarks").joinpath("words.txt").read_text(encoding="utf-8")
    return tuple(text.partition(f"{kind}: ")[2].partition("\n\n")[0].split())


ADJECTIVES: Final = _listed("adjectives")
NOUNS: Final = _listed("nouns")
VERBS: Final = _listed("verbs")

_PEOPLE: Final = (
    *(
        "my grandfather",
        "an old friend",
        "a neighbour of ours",
        "the schoolmaster",
        "a clerk I once knew",
        "her sister",
    ),
    *("the mayor", "a carpenter from the coast", "one of the older pupils", "a traveller", "the widow next door"),
    *("our first tenant", "a young engineer", "the editor", "a fisherman", "the librarian", "my father", "a stranger"),
)
_PLACES: Final = (
    *("in the valley", "near the harbour", "behind the mill", "on the northern road", "at the edge of the town"),
    *("by the river", "under the old bridge", "in the upper village", "along the canal", "beyond the orchard"),
    *("in a small office", "at the market", "on the island", "between the two hills", "close to the station"),
)
_TIMES: Final = (
    *("in the first years", "after the flood", "before the railway came", "one winter", "at the end of that summer"),
    *("for a long time", "on most evenings", "during the harvest", "in a year of bad weather", "when I was a student"),
    *("every spring", "some weeks later", "long ago", "towards the end of the war", "on a wet morning in March"),
)
_PATTERNS: Final = (
    "{When}, {person} kept {a} {adj} {noun} {place}, and nobody asked what it was for.",
    "It is easy to believe that {plural} matter more than {plural}, but {person} knew better.",
    "What made the {noun} {adj} was not its {noun} but the way in which people learned to {verb} around it.",
    "{Person} used to say that {a} {adj} {noun} is worth more than ten {adj} ones.",
    "There were two kinds of {plural} {place}: those that one could {verb}, and those that one had to {verb}.",
    "If you want to {verb} well, you must first be willing to {verb} badly, and that takes more courage than it seems.",
    "{When}, the {plural} {place} were {adj}, the {plural} were {adj}, and yet something had changed.",
    "I have never met anyone who could {verb} without {a} {noun}, although many have tried.",
    "The trouble with {plural} is that they look {adj} from far away and {adj} from near.",
    "{Person} wrote in a letter that the {noun} {place} had become too {adj} to {verb}.",
    "Most of us {verb} because we are afraid to {verb}, and then we call the result {a} {noun}.",
    "A good {noun} is like {a} {adj} {noun}: one notices it only when it is gone.",
    "They decided to {verb} the {adj} {noun}, partly out of habit and partly because {person} insisted.",
    "No one who has seen the {plural} {place} will ever call them {adj} again.",
    "Why should {a} {noun} be {adj} when the {noun} beside it is not?",
    "{When}, I began to {verb} with {person}, and we agreed on almost nothing except the {noun}.",
    "The {adj} part of the work was to {verb}; the {adj} part was to stop.",
    "Perhaps the {noun} was never {adj}, and we only remembered it so because we were young.",
    "{Person} owned three {plural}, {a} {adj} {noun} and a debt that was larger than both.",
    "To {verb} is one thing, and to {verb} for others is another, as every {noun} {place} could tell you.",
    "Between the {noun} and the {noun} lay {a} {adj} field, which belonged to {person}.",
    "It took {person} a whole year to {verb} the {noun}, and another to understand why.",
    "In such {a} {noun} there is always room for {plural}, but seldom for {a} {adj} thought.",
    "The lesson, if there is one, is that {plural} last longer than the people who {verb} them.",
    "{Person} asked for {a} {noun} and was given {a} {adj} {noun} instead.",
    "We say that the {noun} is {adj}, as if that settled the matter.",
)
_LETTERS: Final = re.compile(r"[A-Za-z]{4,}")


class Haystack:
    """Words and prose that things are hidden in.

    Args:
        path: a text file; our own prose and words if None.

    Raises:
        KVPolicyError: the file cannot be read, or has too few different words.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path

    def essay(self, words: int) -> str:
        """Return the first words of the prose; a file that is shorter begins again."""
        if self._path is None:
            return " ".join(islice(self._endless(), words))
        found = self._words_of_file
        return " ".join((found * (words // len(found) + 1))[:words])

    def key(self, rng: random.Random) -> str:
        """Return two words with a hyphen."""
        if self._path is None:
            return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        return "-".join(rng.sample(self._different, 2))

    def different(self, count: int, rng: random.Random) -> list[str]:
        """Return so many different words, pairs of words where there are not enough."""
        single = self._different
        if count <= len(single):
            return rng.sample(single, count)
        chosen = dict.fromkeys(rng.sample(single, len(single)))
        while len(chosen) < count:
            chosen[self.key(rng)] = None
        return list(chosen)

    @cached_property
    def _words_of_file(self) -> list[str]:
        assert self._path is not None
        return Path(existing(self._path)).read_text(encoding="utf-8", errors="replace").split()

    @cached_property
    def _different(self) -> list[str]:
        if self._path is None:
            return sorted({*ADJECTIVES, *NOUNS, *VERBS})
        found = sorted({word.lower() for word in _LETTERS.findall(" ".join(self._words_of_file))})
        if len(found) < _FEWEST:
            raise KVPolicyError(
                f"datasets: {self._path} has {len(found)} different words of four letters and more; ruler needs a text "
                f"with at least {_FEWEST}."
            )
        return found

    def _endless(self) -> Iterator[str]:
        rng = random.Random("prose")  # noqa: S311 - always the same
        while True:
            yield from _sentence(rng).split(" ")


_FEWEST: Final = 200


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun if noun == "scissors" else f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


_WORDS: Final = {
    "adj": ADJECTIVES,
    "noun": NOUNS,
    "plural": tuple(map(_plural, NOUNS)),
    "verb": VERBS,
    "person": _PEOPLE,
    "when": _TIMES,
    "place": _PLACES,
}


def _sentence(rng: random.Random) -> str:
    def fill(found: re.Match[str]) -> str:
        text = rng.choice(_WORDS[found[1].lower()])
        return text[0].upper() + text[1:] if found[1][0].isupper() else text

    filled = re.sub(r"\{(?!a\})(\w+)\}", fill, rng.choice(_PATTERNS))
    return re.sub(r"\{a\} (\w)", lambda found: f"{'an' if found[1] in 'aeiou' else 'a'} {found[1]}", filled)
