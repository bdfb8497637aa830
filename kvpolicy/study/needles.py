"""Needle retrieval: one fact among sentences that say nothing about it, asked for at the end."""

from __future__ import annotations

import random
from typing import Final

_PLACES: Final = (
    *("Arden", "Belmont", "Corvale", "Dunmore", "Eastwick", "Fairlea", "Glenroy", "Hartfield", "Ironvale", "Juniper"),
    *("Kelso", "Larkspur", "Merrow", "Norwood", "Oakham", "Penrith", "Quarley", "Redhill", "Selwick", "Thornby"),
    *("Upwey", "Verona", "Westbury", "Yarrow"),
)
_SUBJECTS: Final = (
    *(
        "The old bridge",
        "A narrow lane",
        "The market hall",
        "An elderly gardener",
        "The evening train",
        "A small museum",
    ),
    *("The village school", "A travelling painter", "The harbour wall", "A retired teacher", "The local bakery"),
)
_ACTIONS: Final = (
    *("was repaired after the long winter", "draws visitors from the whole valley", "opens its doors before sunrise"),
    *("stands at the edge of the forest", "has not changed for many years", "is known for its quiet mornings"),
    *(
        "appears in several old photographs",
        "takes its name from the river nearby",
        "closes when the weather turns bad",
    ),
)
_ENDS: Final = (
    *("and nobody minds the noise", "as the papers reported at the time", "which surprised the newcomers"),
    *("although few people remember why", "and the children like to watch", "so the council left it alone"),
)


def needle(seed: int, words: int, needles: int) -> tuple[str, str, str]:
    """Return a text with hidden facts, a question about it, and its answer.

    Args:
        seed: the only source of randomness.
        words: about how long the text is.
        needles: how many facts of the same form it hides; one of them is asked for. At most 24.

    Returns:
        (text, question, answer); the answer is a number of four digits. The prompt is text and question.
    """
    rng = random.Random(f"needle/{words}/{needles}/{seed}")  # noqa: S311 - not a secret
    sentences, length = [], 0
    while length < words:
        sentence = f"{rng.choice(_SUBJECTS)} of {rng.choice(_PLACES)} {rng.choice(_ACTIONS)} {rng.choice(_ENDS)}."
        sentences.append(sentence)
        length += len(sentence.split())
    places = rng.sample(_PLACES, needles)
    numbers = rng.sample(range(1000, 10000), needles)
    slots = sorted(rng.sample(range(len(sentences) + needles), needles))
    for slot, place, number in zip(slots, places, numbers, strict=True):
        sentences.insert(slot, f"The secret number of {place} is {number}.")
    asked = rng.randrange(needles)
    question = f"\n\nWhat is the secret number of {places[asked]}? Answer with the number only."
    return " ".join(sentences), question, str(numbers[asked])
