"""What no policy can use is refused by name: endless numbers and nesting, tags, files that would be waited for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

import kvpolicy
from kvpolicy import PolicySpec, SpecError
from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.inputs import read_bytes, require_ordinary
from kvpolicy.spec.values import check_values
from kvpolicy.study.spec import StudySpec

HEAD = "schema_version: 1\npolicy: p\n"
REST = "trigger: {every: 16}\nimportance: key_norm\n"
STUDY = "schema_version: 1\nkind: study\nstudy: s\naxes: {policy: [rkv]}\nmodels: [m]\ndatasets: [gsm8k]\n"
PARTS = {"policy": "p", "budget": 64, "trigger": {"every": 16}, "importance": "key_norm"}
HUGE = 10**6000  # Python itself refuses to write it out


def refusal(read, *given, **fields):
    with pytest.raises(SpecError) as caught:
        read(*given, **fields)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


# -- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "decimal": ("9" * 5000, "9999999999... is a number of 5,000 characters; write at most 100."),
    "400 digits": ("9" * 400, "is a number of 400 characters"),
    "negative": ("-" + "9" * 400, "is a number of 401 characters"),
    "hexadecimal": ("0x" + "f" * 20_000, "is a number of 20,002 characters"),
    "octal": ("0o" + "7" * 20_000, "is a number of 20,002 characters"),
    "float": ("0." + "9" * 5000, "is a number of 5,002 characters"),
    "exponent": ("1e" + "9" * 5000, "is a number of 5,002 characters"),
}


@pytest.mark.parametrize(("number", "reason"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("field", ["budget", "budget: {fraction", "budget: {tokens", "prefill_chunk", "policy"])
def test_a_number_without_end_is_refused_in_a_file(number, reason, field):
    others = "".join(f"{name}: {value}\n" for name, value in (("policy", "p"), ("budget", 4)) if name not in field)
    text = f"schema_version: 1\n{field}: {number}{'}' if '{' in field else ''}\n{others}{REST}"
    message = refusal(PolicySpec.from_yaml, text, "p.yaml")
    assert message.startswith("p.yaml:2:")
    assert message.endswith("; write at most 100.")
    assert reason in message
    study = f"{STUDY}samples: {number}\n"
    assert refusal(StudySpec.from_yaml, study, "s.yaml").startswith("s.yaml:7:10: ")


@pytest.mark.parametrize(
    "value",
    [HUGE, -HUGE, [[HUGE]], {"use": HUGE}, {"every": HUGE}, {HUGE: 1}],
    ids=["alone", "negative", "in lists", "as a name", "as a parameter", "as a key"],
)
@pytest.mark.parametrize("field", sorted(PolicySpec.model_fields))
def test_a_number_without_end_is_refused_in_python(field, value):
    message = refusal(PolicySpec, **{**PARTS, field: value})
    assert message.startswith(field)
    assert "is a number of 6,001 digits" in message
    assert message == refusal(kvpolicy.load, "rkv", **{field: value})


def test_paths_and_studies_have_the_same_bounds():
    assert "is not a path" in refusal(kvpolicy.load("rkv").replace, HUGE, 3)
    study = {"study": "s", "models": ["x"], "datasets": ["gsm8k"]}
    assert "is a number of 6,001 digits" in refusal(StudySpec, **study, samples=HUGE)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"budget": 2**31 + 1}, "budget.tokens"),
        ({"budget": {"tokens": 2**40}}, "budget.tokens"),
        ({"prefill_chunk": 2**31 + 1}, "prefill_chunk"),
        ({"trigger": {"every": 2**31 + 1}}, "trigger.interval"),
        ({"trigger": {"use": "every", "align": 2**63}}, "trigger.align"),
        ({"protect": {"recent": 2**31 + 1}, "budget": {"fraction": 0.5}}, "protect.recent.count"),
        ({"importance": {"use": "window_attention", "observe": 2**40}}, "importance.observe"),
        ({"importance": {"use": "random", "seed": 2**64}}, "importance.seed"),
        ({"importance": {"use": "leverage", "seed": 2**64}}, "importance.seed"),
    ],
)
def test_what_can_never_fire_is_refused(change, place):
    assert refusal(PolicySpec, **{**PARTS, **change}).startswith(f"{place}: ")


def test_what_may_just_be_reached_is_not():
    spec = PolicySpec(**{**PARTS, "budget": LONGEST_TEXT, "trigger": {"every": LONGEST_TEXT}, "prefill_chunk": None})
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    seeds = PolicySpec(**{**PARTS, "importance": {"use": "random", "seed": 2**64 - 1}})
    assert PolicySpec.from_yaml(seeds.to_yaml()) == seeds
    with pytest.raises(ValidationError, match="tokens"):
        Budget(tokens=LONGEST_TEXT + 1)


def test_the_schema_has_the_same_bounds():
    schema = kvpolicy.spec.json_schema()
    tokens = schema["properties"]["budget"]["anyOf"][0]["properties"]["tokens"]
    every = next(form for form in schema["$defs"]["trigger"]["anyOf"] if form.get("title") == "every")
    assert tokens["maximum"] == every["properties"]["interval"]["maximum"] == LONGEST_TEXT


# -- nesting ----------------------------------------------------------------------------------------------------------


def nested(depth, make):
    value = "key_norm"
    for _ in range(depth):
        value = make(value)
    return value


ENDLESS: list = []
ENDLESS.append(ENDLESS)
TWICE = nested(30, lambda value: [value, value])  # two to the thirtieth, and 30 lists


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "value",
    [
        nested(1000, lambda value: {"use": "value_weighted", "base": value}),
        nested(1000, lambda value: [value]),
        nested(100_000, lambda value: (value,)),
        ENDLESS,
        TWICE,
        dict.fromkeys(map(str, range(200_000)), 1),
    ],
    ids=["components", "lists", "tuples", "itself", "twice", "wide"],
)
@pytest.mark.parametrize("field", ["importance", "description", "protect"])
def test_nesting_without_end_is_refused(field, value):
    start = time.process_time()
    message = refusal(PolicySpec, **{**PARTS, field: value})
    assert message.startswith(f"{field}: ")
    assert "nested more than 32 levels deep" in message or "more than 100,000 values" in message
    assert time.process_time() - start < 5


def test_components_nested_without_end_are_refused_when_they_are_made():
    catalog = kvpolicy.catalog()
    deepest = []

    def nest():
        made = catalog.get("importance", "key_norm")()
        for _ in range(1000):
            made = catalog.get("importance", "value_weighted")(base=made)
            deepest.append(made)

    with pytest.raises(ValidationError, match="nested more than 16 deep"):
        nest()
    spec = PolicySpec(**{**PARTS, "importance": deepest[-1]})
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert hash(spec.build())


def test_plain_values_are_left_alone():
    check_values({"a": [1, 2.5, None, True, "é\n", {"b": ()}], "c": float("inf"), "d": object(), "e": 2**64})


# -- tags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("!!int '4'", "!!int"),
        ("!!int 4", "!!int"),
        ("!!str 4", "!!str"),
        ("!!float 4", "!!float"),
        ("!!bool 'true'", "!!bool"),
        ("!!null ''", "!!null"),
        ("!!map {tokens: 4}", "!!map"),
        ("{tokens: !!int 4}", "!!int"),
        ("[!!seq []]", "!!seq"),
        ("!!set {a}", "!!set"),
        ("! 4", "!"),
        ("!own 4", "!own"),
        ("!<tag:yaml.org,2002:int> 4", "!!int"),
        ("!<x:y> 4", "x:y"),
    ],
)
def test_tags_are_refused_those_of_plain_values_too(value, tag):
    for field in ("budget", "description"):
        rest = REST if field == "budget" else f"budget: 4\n{REST}"
        message = refusal(PolicySpec.from_yaml, f"{HEAD}{field}: {value}\n{rest}", "p.yaml")
        assert message.startswith("p.yaml:3:")
        assert message.endswith(f": tags such as `{tag}` are not allowed; write a plain value.")


def test_tags_of_keys_documents_and_by_handle_are_refused():
    for text in (f"{HEAD}!!str budget: 4\n{REST}", f"--- !!map\n{HEAD}budget: 4\n{REST}"):
        assert "tags such as" in refusal(PolicySpec.from_yaml, text)
    text = f"%TAG !e! tag:yaml.org,2002:\n---\n{HEAD}budget: !e!int 4\n{REST}"
    assert "tags such as `!!int`" in refusal(PolicySpec.from_yaml, text)


# -- files ------------------------------------------------------------------------------------------------------------

WAITING = [path for path in ("/proc/kmsg", "/sys/kernel/tracing/trace_pipe") if os.access(path, os.R_OK)]


@pytest.mark.timeout(30)
def test_files_that_would_be_waited_for_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "pipe.yaml")
    paths = [tmp_path / "pipe.yaml", tmp_path / "link.yaml", *map(Path, ("/dev/zero", "/dev/null", "/dev/tty"))]
    (tmp_path / "mine.yaml").write_text(f"{HEAD}extends: pipe.yaml\n")
    for path in (*paths, *map(Path, WAITING)):
        for read in (PolicySpec.from_file, StudySpec.from_file, kvpolicy.load):
            assert "is not an ordinary file" in refusal(read, path)
        with pytest.raises(kvpolicy.KVPolicyError, match=r"^--x: .* is not an ordinary file"):
            require_ordinary(path, "x", option="--x")
    assert "is not an ordinary file" in refusal(PolicySpec.from_file, tmp_path / "mine.yaml")


def test_homes_of_nobody_are_no_files():
    for read in (kvpolicy.load, PolicySpec.from_file, StudySpec.from_file):
        assert refusal(read, "~nosuch/x.yaml") == "~nosuch/x.yaml: there is no such file."
    assert refusal(kvpolicy.load, "x", search="~nosuch").startswith("~nosuch: there is no such folder")
    assert "~nosuch/x.yaml: there is no such file" in refusal(PolicySpec.from_yaml, f"{HEAD}extends: ~nosuch/x.yaml\n")


@pytest.mark.parametrize("search", ["a\0b", "x" * 5000, "/dev/null", "/proc/self/mem", "a\nb"])
def test_folders_that_are_none(search):
    assert "there is no such folder" in refusal(kvpolicy.load, "x", search=search)


def test_what_is_read_is_bounded(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, "text file", most=100) == b"x" * 100
    with pytest.raises(kvpolicy.KVPolicyError, match="is larger than 0 KiB; that is not a text file"):
        read_bytes(path, "text file", most=99)
    require_ordinary(path, "text file")
