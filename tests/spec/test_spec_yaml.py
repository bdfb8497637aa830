"""What YAML knows and a policy file does not: one sentence with the place and the mend."""

from __future__ import annotations

import pytest

from kvsupport.spec_good import expect_mistake

# As in test_spec_errors.
MISTAKES = {
    "duplicate field": (
        "redundancy:",
        "policy: q\nredundancy:",
        "p.yaml:9:1: 'policy' is given twice, first in line 2; remove one.",
    ),
    "duplicate parameter": (
        "weight: 0.1",
        "weight: 0.1, weight: 0.2",
        "p.yaml:10:35: 'weight' is given twice, first in line 10; remove one.",
    ),
    "key is a number": ("weight: 0.1", "1: 0.1", "p.yaml:10:22: the key 1 is not text; put it in quotes."),
    "alias": (
        "redundancy:",
        "description: *x\nredundancy:",
        "p.yaml:9:14: aliases such as `*x` are not allowed; write the value out, or use `extends`.",
    ),
    "anchor": (
        "redundancy:",
        "description: &x text\nredundancy:",
        "p.yaml:9:14: anchors such as `&x` are not allowed; write the value out where it is needed.",
    ),
    "tag": (
        "redundancy:",
        "description: !!python/object/apply:os.system [ls]\nredundancy:",
        "p.yaml:9:14: tags such as `!!python/object/apply:os.system` are not allowed; write a plain value.",
    ),
    "binary tag": (
        "redundancy:",
        "description: !!binary aGk=\nredundancy:",
        "p.yaml:9:14: tags such as `!!binary` are not allowed; write a plain value.",
    ),
    "wrong tag": (
        "observe: 8",
        "observe: !!int eight",
        "p.yaml:8:12: tags such as `!!int` are not allowed; write a plain value.",
    ),
    "tab": (
        "  observe: 8",
        "\tobserve: 8",
        "p.yaml:8:1: not valid YAML, because a tab stands where spaces belong; indent with spaces.",
    ),
    "unclosed": (
        "{tokens: 64}",
        "{tokens: 64",
        "p.yaml:4:8: not valid YAML: expected ',' or '}', but got ':' (while parsing a flow mapping).",
    ),
    "two documents": (
        "redundancy:",
        "---\nredundancy:",
        "p.yaml:9:1: a policy file holds one document; remove the second `---`.",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_sentence_with_place_and_mend(old, new, message):
    expect_mistake(old, new, message)
