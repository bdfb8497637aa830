"""Mutated study files: a study, or one error that names the place; no traceback, hang or execution.

See `kvsupport.fuzzing` for seeds and numbers of cases.
"""

from __future__ import annotations

import pytest
import yaml

import kvpolicy
from kvpolicy import SpecError
from kvpolicy.cli import main
from kvpolicy.spec import yaml_text
from kvpolicy.study.spec import StudySpec
from kvsupport.fuzzing import (
    ANYTHING,
    bounded,
    bounded_memory,
    cases,
    change_structure,
    change_text,
    check_mixture,
    check_sentence,
)

FILES = {entry.name: entry.path for entry in kvpolicy.catalog().studies()}
VALUES = [
    *ANYTHING, {"use": "needle"}, {"use": "needle", "words": -1}, {"use": "needle", "words": 10**8}, {"trace": 0.5},
    {"trace": 7}, {"trace": None}, {"trace": 0.1, "tokens": 3}, {"budget": [64]}, {"policy": ["rkv", "snapkv"]},
    {"mixer.weight": list(range(200))}, {"budget": list(range(1, 500)), "trigger.interval": list(range(1, 500))},
    {"use": "jsonl", "path": "/dev/zero"}, {"use": "text", "path": []}, {"extends": "/dev/zero"}, {"extends": "rkv"},
    {"use": "generator", "family": "prompt-recall", "samples": 10**9},
]  # fmt: skip
KEYS = ["quick", "exclude", "extra", "use", "trace", "conditions"]
PIECES = ["quick: {{samples: 0}}", "exclude: [{{}}]", "compare_to: nothing", "axes: {{}}", "kind: policy"]
BROKEN = (yaml.YAMLError, SpecError, AttributeError, TypeError, IndexError, KeyError, ValueError, RecursionError)


def mutated(draw, mark):
    text = FILES[draw.choice(sorted(FILES))].read_text(encoding="utf-8")
    for _ in range(draw.choice([1, 1, 1, 2])):
        if draw.random() < 0.3:
            text = change_text(draw, text, mark, PIECES)
            continue
        try:
            data = yaml.safe_load(text)
            change_structure(draw, data, VALUES, KEYS)
            text = yaml_text.write(data) if draw.random() < 0.5 else yaml.safe_dump(data, allow_unicode=False)
        except BROKEN:  # what an earlier change has left is no file any more
            text = change_text(draw, text, mark, PIECES)
    return text


@pytest.mark.timeout(0)
def test_a_mutated_study_is_read_or_refused_in_one_sentence(tmp_path, capsys):
    file, mark = tmp_path / "fuzz.yaml", tmp_path / "mark"
    counts = {"read": 0, "refused": 0}
    with bounded_memory():
        for case, draw in cases("study", 250):
            file.write_bytes(mutated(draw, mark).encode("utf-8", "surrogatepass"))
            with bounded(f"case {case}"):
                try:
                    spec = StudySpec.from_file(file)
                except SpecError as error:
                    counts["refused"] += 1
                    sentence = str(error)
                else:
                    counts["read"] += 1
                    sentence = "fuzz.yaml"
                    assert StudySpec(**spec.to_data()) == spec, case
            assert "fuzz.yaml" in sentence, case
            check_sentence(sentence, case)
            if case % 50 == 0:
                code = main(["study", "status", str(file), "--out", str(tmp_path / "none.sqlite")])
                out, err = capsys.readouterr()
                assert (code, out, err[:7]) == (1, "", "error: "), case
                for line in err.splitlines():  # a command says all that is wrong, each in a sentence
                    assert line.startswith("error: "), case
                    check_sentence(line, case)
    assert not mark.exists()
    print(counts)
    check_mixture(0.02, *counts.values())
