"""The words of the synthetic reasoning problems: names, prompts and the long, self-checking sentences of a solution.

Everything is written in words that a single blank separates, so that a word-level tokenizer needs one entry per word.
Each step comes in three wordings; the name of the place decides which, so that a greedy decoder has one right
continuation.
"""

from __future__ import annotations

from typing import Final, Literal

Family = Literal["prompt-recall", "trace-recall", "restated-recall"]
Form = Literal["full", "brief", "walk"]
Times = Literal[0, 1, 2]

# fmt: off
NAMES: Final = (
    "ann", "ben", "cat", "dan", "eve", "fay", "gus", "hal", "ivy", "joe", "ken", "lee",
    "max", "ned", "oli", "pat", "roy", "sue", "tom", "una", "vic", "wes", "yan", "zoe",
)
# fmt: on
STOP: Final = "stop"
SPECIAL: Final = ("<pad>", "<unk>", "<bos>", "<eos>")

# The first word of the prompt says which form the solution has. Published problems always begin with "problem"; the
# other two are steps of the training curriculum.
FIRST_WORD: Final[dict[Form, str]] = {"full": "problem", "brief": "brief", "walk": "walk"}

# n, d, m: the line "n d m" of the list (place, digit, next place); t, u: the total before and after it.
_PROMPT_RECALL: Final = (
    (
        "now we are at {n} and the total is {t} . let me look at the list again . {n} {d} {m} . so {t} plus {d} is "
        "{u} . wait , let me check this again . {n} {d} {m} . and {t} plus {d} is {u} . yes , that is right . the "
        "problem asks for the final total , not for the total at {n} , so a single step is not enough , and i must "
        "not lose the thread here . hmm , before i go on i want to be sure about {n} . the list says {n} {d} {m} , "
        "we had {t} , we add {d} , and we get {u} . it is the same as before , which is good . now i can write the "
        "result down and take the next line . so the total is {u} and the next one is {m} ."
    ),
    (
        "okay , this is {n} with a total of {t} . where was {n} in the list ? {n} {d} {m} . then {t} plus {d} makes "
        "{u} . hold on , i should read the line once more . {n} {d} {m} . yes , {t} plus {d} makes {u} , i am sure "
        "about that . it is easy to slip in a long list like this one , and one wrong step would spoil all that "
        "follows after it . to be careful , let me do {n} another time , from the start . we came here with {t} , "
        "the line is {n} {d} {m} , so we add {d} to it and have {u} . nothing has changed , fine . this step is done "
        "and we can move on to another place . so the total is {u} and the next one is {m} ."
    ),
    (
        "here we stand at {n} , so far the sum is {t} . i have to find {n} among the lines . {n} {d} {m} . adding "
        "{d} to {t} gives {u} . let me verify that , because it is cheap . {n} {d} {m} . and adding {d} to {t} gives "
        "{u} , as i said . remember what we are asked : we walk from place to place , add up every digit that we "
        "meet , and only stop where the list tells us to . let me think about {n} from the other side too . after it "
        "comes {m} , its digit is {d} , the sum was {t} and now must be {u} . all of this agrees , so there is no "
        "reason to doubt it any longer . so the total is {u} and the next one is {m} ."
    ),
)

# n, d, p, m: the line "n d p m" (name, digit, parent, next name); a, b: the values of p and n.
_TRACE_RECALL: Final = (
    (
        "okay , so i am at {n} . hmm , let me go back and read the list . {n} {d} {p} {m} . i need {p} here . what "
        "was it ? {p} is {a} . so {a} plus {d} is {b} . {n} is {b} . hmm , let me double check . {n} takes {d} and "
        "{p} . {p} is {a} , and {a} plus {d} is {b} again . that matches . the questions come at the end , and any "
        "name may be needed on the way , so i have to keep in mind that {n} is {b} . i think this is correct , let "
        "me continue . so we have {n} is {b} and we go to {m} ."
    ),
    (
        "the turn of {n} . what does its line say ? {n} {d} {p} {m} . it builds on {p} , so let me recall that one . "
        "{p} is {a} . adding {d} to {a} gives {b} . {n} is {b} . wait , is that so ? i will go through it once more "
        ". the parent of {n} is {p} , and {p} is {a} , we add {d} , this gives {b} . yes , the same result as before "
        ". only the last digit counts here , the rest is dropped , and later lines may build on {n} . good , this "
        "one is done . so we have {n} is {b} and we go to {m} ."
    ),
    (
        "we come to {n} . first i look for {n} in the list of the problem . {n} {d} {p} {m} . this needs the value "
        "of {p} . earlier i found it : {p} is {a} . then {a} and {d} make {b} . {n} is {b} . i should verify this "
        "before moving on . again , {p} is {a} , the digit of {n} is {d} , together they make {b} . no mistake in "
        "that . there may be a long way between here and the place where it is asked for , but the value will not "
        "change any more . so we have {n} is {b} and we go to {m} ."
    ),
)

# What ends a line of restated-recall says how often its step goes through the values that are still needed.
MARKS: Final[dict[Times, str]] = {0: ".", 1: "once", 2: "double"}

# n, d, p, m as above, mark: what ends the line; a, b: the values of p and n; s1, s2: the places where values are said
# again, or as many words about nothing. The value of n is said once besides.
_RESTATED_RECALL: Final = (
    (
        "okay , so i am at {n} . {n} {d} {p} {m} {mark} i need {p} here . {p} is {a} . so {a} plus {d} is {b} . so we "
        "have {n} is {b} and we go to {m} . {s1} let me double check . {n} {d} {p} {m} {mark} that matches . {s2}"
    ),
    (
        "the turn of {n} . its line says {n} {d} {p} {m} {mark} let me recall {p} . {p} is {a} . adding {d} to {a} "
        "gives {b} . so we have {n} is {b} and we go to {m} . {s1} wait , once more . {n} {d} {p} {m} {mark} yes , the "
        "same . {s2}"
    ),
    (
        "we come to {n} . i look for {n} . {n} {d} {p} {m} {mark} earlier i found {p} is {a} . then {a} and {d} make "
        "{b} . so we have {n} is {b} and we go to {m} . {s1} i verify the line . {n} {d} {p} {m} {mark} no mistake in "
        "that . {s2}"
    ),
)
# Four values take as many words, give or take one, as what stands there otherwise, so all traces are about as long.
RESTATE: Final = ("so far we have {values} .", "remember , we have {values} .")
REST: Final = (
    (
        "it is easy to lose the thread in a long list like this , so i must be careful .",
        "there is nothing to doubt in it any longer , this step is done , we can move on .",
    ),
    (
        "only the last digit counts and the rest is dropped , as it was in the step before .",
        "i am sure about all of that , it is fine , and now i go on to another .",
    ),
    (
        "later lines may build on it , and there may be a long way from here to the end .",
        "a wrong step would spoil all that follows after it , but it is good and we go on .",
    ),
)

STEP: Final[dict[tuple[Family, Form], tuple[str, ...]]] = {
    ("prompt-recall", "full"): _PROMPT_RECALL,
    ("prompt-recall", "brief"): (
        "{n} {d} {m} . so {t} plus {d} is {u} . so the total is {u} and the next one is {m} .",
    ),
    ("prompt-recall", "walk"): ("{n} {d} {m} .",),
    ("trace-recall", "full"): _TRACE_RECALL,
    ("trace-recall", "brief"): (
        "{n} {d} {p} {m} . {p} is {a} . so {a} plus {d} is {b} . so we have {n} is {b} and we go to {m} .",
    ),
    ("trace-recall", "walk"): ("{n} {d} {p} {m} .",),
    ("restated-recall", "full"): _RESTATED_RECALL,
    ("restated-recall", "brief"): (
        (
            "{n} {d} {p} {m} {mark} {p} is {a} . so {a} plus {d} is {b} . so we have {n} is {b} and we go to {m} . "
            "{s1} {s2}"
        ),
    ),
    ("restated-recall", "walk"): ("{n} {d} {p} {m} {mark}",),
}
PROMPT: Final[dict[Family, str]] = {
    "prompt-recall": "{first} : start at {start} with {total} . list : {lines} . find the final total . <think>",
    "trace-recall": "{first} : start at {start} . {root} is {value} . list : {lines} . find {asked} . <think>",
    "restated-recall": "{first} : start at {start} . {root} is {value} . list : {lines} find {asked} . <think>",
}
END: Final = "we stop . </think> the answer is {answer} ."


def step(family: Family, form: Form, **words: str) -> str:
    """Return the sentences of one step; ``words`` fills the fields of the template, ``n`` decides the wording."""
    choices = STEP[family, form]
    return choices[NAMES.index(words["n"]) % len(choices)].format(**words)


def restating(form: Form, n: str, values: str, times: Times) -> dict[str, str]:
    """Return the fields ``s1`` and ``s2`` of a step of restated-recall.

    Args:
        form: only the full form has words where nothing is said again.
        n: the name of the step, which decides these words.
        values: what is said again, "x is 3 , y is 5".
        times: how often; once is in the second place.
    """
    rest = REST[NAMES.index(n) % len(REST)] if form == "full" else ("", "")
    said = tuple(text.format(values=values) for text in RESTATE)
    return {"s1": said[0] if times == 2 else rest[0], "s2": said[1] if times >= 1 else rest[1]}


def vocabulary() -> tuple[str, ...]:
    """Return every word that problems and solutions are made of: special tokens first, the others sorted."""
    templates = [*(text for choices in STEP.values() for text in choices), *PROMPT.values(), END]
    templates += [*RESTATE, *(text for choice in REST for text in choice)]
    words = {word for template in templates for word in template.split() if "{" not in word}
    words |= {*NAMES, *FIRST_WORD.values(), *MARKS.values(), *map(str, range(10)), STOP, ","}
    return (*SPECIAL, *sorted(words))
