"""Characters that a terminal obeys, or that turn text round, come in with no file and reach no terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.table import Table

import kvpolicy
from kvpolicy import PolicySpec, SpecError, errors
from kvpolicy.cli import main, terminal
from kvpolicy.odd_text import harmless, odd_character
from kvpolicy.study.spec import StudySpec

ODD = {
    "\x1b]0;owned\x07": "U+001B, an escape",
    "a\0b": "U+0000, NUL",
    "\x07": "U+0007, a bell",
    "x\x9b2J": "U+009B, a control character",
    "\u202etxt.exe": "U+202E, a character that turns the direction of text",
    "\u2066x": "U+2066, a character that turns the direction of text",
    "\ud800": "U+D800, half of a surrogate pair",
}
POLICY = """\
schema_version: 1
policy: mine
{field}: {value}
budget: 64
trigger: {{every: 16}}
importance: key_norm
"""
STUDY = """\
schema_version: 1
kind: study
study: mine
base: rkv
models: [smollm2]
{fields}
"""


def quoted(text):
    return json.dumps(text)  # JSON's escapes are YAML's


@pytest.mark.parametrize(("text", "what"), ODD.items(), ids=[what.partition(",")[0] for what in ODD.values()])
@pytest.mark.parametrize("field", ["description", "paper", "departures"])
def test_a_policy_file_is_refused_by_field(tmp_path, text, what, field):
    value = f"[fine, {quoted(text)}]" if field == "departures" else quoted(text)
    (tmp_path / "mine.yaml").write_text(POLICY.format(field=field, value=value))
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_file(tmp_path / "mine.yaml")
    path = "departures.1" if field == "departures" else field
    assert "mine.yaml:3:" in str(caught.value)
    assert str(caught.value).endswith(
        f": {path}: contains {what}, which does something instead of showing something; remove it."
    )
    given = ("fine", text) if field == "departures" else text
    with pytest.raises(SpecError, match=f"^{path}: contains "):
        kvpolicy.load("rkv").model_copy(update={field: given})


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ('description: "\\e]0;x"\ndatasets: [gsm8k]', "description"),
        ('datasets: [{use: jsonl, path: "a\\0b"}]', "datasets.0.path"),
        ('datasets: [{use: hub, id: x, template: "{question}\\u202e"}]', "datasets.0.template"),
        ('datasets: [gsm8k]\naxes: {"mixer\\u001b": [1]}', "axes.mixer"),
        ('datasets: [gsm8k]\naxes: {policy: [{extends: rkv, description: "\\ud800"}]}', "axes.policy.0.description"),
        ('datasets: [gsm8k]\ncompare_to: "\\u2067"', "compare_to"),
    ],
)
def test_a_study_file_is_refused_by_field(tmp_path, fields, path):
    (tmp_path / "mine.yaml").write_text(STUDY.format(fields=fields))
    with pytest.raises(SpecError) as caught:
        StudySpec.from_file(tmp_path / "mine.yaml")
    assert "mine.yaml:" in str(caught.value)
    assert f": {path}" in str(caught.value)
    assert "contains U+" in str(caught.value)
    assert odd_character(str(caught.value)) is None


@pytest.mark.parametrize("text", ["", "é \u2028 \x85 \t line\nline", "日本 🙂", "−×λ"])
def test_everything_else_is_text(text):
    assert odd_character(text) is None
    assert harmless(text) == text


def test_what_reaches_a_terminal_is_printed_harmlessly():
    console = terminal._Plain(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=200, highlight=False, markup=False
    )
    assert type(terminal.output()) is type(terminal.messages()) is type(console)
    text = "".join(ODD)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(text, style="red")
    console.print(table)
    printed = console.file.getvalue()
    assert "\x1b[31m" in printed, "its own colours stay"
    for escape in ("\x1b[31m", "\x1b[0m", "\x1b[1m", "\x1b[3m"):
        printed = printed.replace(escape, "")
    assert odd_character(printed) is None
    assert "\\x1b]0;owned" in printed
    assert "\\u202e" in printed
    assert "\\ud800" in printed


def test_an_error_is_printed_harmlessly(capsys, tmp_path):
    assert main(["validate", f"{tmp_path}/\x1b]0;x.yaml"]) == 1
    assert main(["study", "status", "\x1b]0;x"]) == 1
    err = capsys.readouterr().err
    assert odd_character(err) is None
    assert "\\x1b]0;x.yaml: there is no such file" in err


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_no_error_holds_what_a_terminal_obeys(name):
    error = getattr(errors, name)("x\x1b]0;y\x07 \ud800.yaml: is\tnothing")
    assert str(error) == "x\\x1b]0;y\\x07 \\ud800.yaml: is\tnothing"


def test_nor_do_the_other_problems_of_a_file():
    error = SpecError("first", ["first", "second \x1b"])
    assert error.problems == ("first", "second \\x1b")


def test_the_name_of_a_file_is_written_out(tmp_path):
    path = tmp_path / "a\x1b[2J.yaml"
    path.write_text("policy: 3\n")
    with pytest.raises(SpecError, match=r"a\\x1b\[2J\.yaml:1:1: ") as caught:
        PolicySpec.from_file(path)
    assert all(odd_character(problem) is None for problem in caught.value.problems)
