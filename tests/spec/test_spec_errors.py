"""Whatever is wrong with a policy, the user reads one sentence with the place and the mend."""

from __future__ import annotations

import pytest

import kvpolicy
from kvpolicy import PolicySpec, UnknownComponentError
from kvsupport.spec_good import GOOD, error_of, expect_mistake


def test_the_good_file_is_good():
    assert PolicySpec.from_yaml(GOOD).policy == "p"


# What is replaced in GOOD, by what, and the whole message; <kind> stands for all registered names of a kind.
FIELDS = {
    "unknown component": (
        "use: window_attention",
        "use: window_atention",
        (
            "p.yaml:6:1: importance: unknown importance 'window_atention'. Did you mean 'window_attention'? Known: "
            "<importance>."
        ),
    ),
    "unknown component in short": (
        "redundancy: key_cosine",
        "redundancy: key_cosinus",
        "p.yaml:9:1: redundancy: unknown redundancy 'key_cosinus'. Did you mean 'key_cosine'? Known: <redundancy>.",
    ),
    "component of another kind": (
        "redundancy: key_cosine",
        "redundancy: key_norm",
        (
            "p.yaml:9:1: redundancy: unknown redundancy 'key_norm'. That is the name of an importance. "
            "Known: <redundancy>."
        ),
    ),
    "unknown protection": (
        "sinks: 4",
        "sink: 4",
        ("p.yaml:5:11: protect.sink: unknown protection 'sink'. Did you mean 'sinks'? Known: <protection>."),
    ),
    "unknown trigger": (
        "{every: 16}",
        "{evry: 16}",
        (
            "p.yaml:4:1: trigger: does not say which component. Did you mean 'every'? "
            "Write {use: name, ...} with one of <trigger>."
        ),
    ),
    "component without use": (
        "{use: linear, weight: 0.1}",
        "{weight: 0.1}",
        "p.yaml:10:1: mixer: does not say which component. Write {use: name, ...} with one of <mixer>.",
    ),
    "unknown parameter": (
        "observe: 8",
        "observed: 8",
        (
            "p.yaml:8:3: importance.observed: 'window_attention' has no such parameter. Did you mean 'observe'? "
            "Parameters: observe, group, group_stage, softmax_over, smooth, smooth_kind, smooth_stage."
        ),
    ),
    "parameter where there is none": (
        "redundancy: key_cosine",
        "redundancy: {use: none, beta: 1}",
        "p.yaml:9:25: redundancy.beta: 'none' has no such parameter. It has no parameters.",
    ),
    "text for a number": (
        "observe: 8",
        "observe: eight",
        "p.yaml:8:3: importance.observe: should be a valid integer, got 'eight'.",
    ),
    "quoted number": (
        "observe: 8",
        "observe: '8'",
        "p.yaml:8:3: importance.observe: should be a valid integer, got '8'.",
    ),
    "fraction for an integer": (
        "observe: 8",
        "observe: 8.5",
        "p.yaml:8:3: importance.observe: should be a valid integer, got 8.5.",
    ),
    "boolean for an integer": (
        "observe: 8",
        "observe: true",
        "p.yaml:8:3: importance.observe: should be a valid integer, got True.",
    ),
    "out of range": (
        "observe: 8",
        "observe: 0",
        "p.yaml:8:3: importance.observe: should be greater than or equal to 1, got 0.",
    ),
    "not one of": (
        "observe: 8",
        "group: maxx",
        "p.yaml:8:3: importance.group: should be 'max' or 'mean', got 'maxx'. Did you mean 'max'?",
    ),
    "shorthand value": (
        "every: 16",
        "every: 0",
        "p.yaml:4:11: trigger.interval: should be greater than or equal to 1, got 0.",
    ),
    "shorthand text": (
        "every: 16",
        "every: often",
        "p.yaml:4:11: trigger.interval: should be a valid integer, got 'often'.",
    ),
    "trigger off": (
        "every: 16",
        "every: false",
        "p.yaml:4:11: trigger.interval: should be a valid integer, got False.",
    ),
    "a number for a trigger": (
        "{every: 16}",
        "64",
        (
            "p.yaml:4:1: trigger: should be the name of a component or {use: name, ...}, got 64. Write for example "
            "{every: 64}."
        ),
    ),
    "a policy for its mixer": (
        "{use: linear, weight: 0.1}",
        "mixkv",
        (
            "p.yaml:10:1: mixer: unknown mixer 'mixkv'. That is the name of a policy. Known: <mixer>. The mixer of the "
            "policy 'mixkv' is 'head_adaptive'."
        ),
    ),
    "a name that is nearest to one of another kind": (
        "redundancy: key_cosine",
        "redundancy: value_norms",
        (
            "p.yaml:9:1: redundancy: unknown redundancy 'value_norms'. Did you mean the importance 'value_norm'? "
            "Known: <redundancy>."
        ),
    ),
    "compression ratio": (
        "budget: {tokens: 64}",
        "compression_ratio: 0.7",
        (
            "p.yaml:3:1: compression_ratio: there is no such field. "
            "kvpress's compression_ratio is the share that goes, "
            "and a budget the share that stays: for 0.7 write `budget: {fraction: 0.3}`."
        ),
    ),
    "compression ratio as a budget": (
        "tokens: 64",
        "compression_ratio: x",
        (
            "p.yaml:3:10: budget.compression_ratio: there is no such key. "
            "kvpress's compression_ratio is the share that "
            "goes, and a budget the share that stays: 0.7 there is `budget: {fraction: 0.3}` here."
        ),
    ),
    "bare value without shorthand": (
        "{every: 16}",
        "{each_step: 3}",
        "p.yaml:4:11: trigger.each_step: should be true or its parameters, got 3.",
    ),
    "protection parameter": (
        "sinks: 4",
        "sinks: {number: 4}",
        "p.yaml:5:19: protect.sinks.number: 'sinks' has no such parameter. Parameters: count.",
    ),
    "protection value": (
        "sinks: 4",
        "sinks: -1",
        "p.yaml:5:11: protect.sinks.count: should be greater than or equal to 0, got -1.",
    ),
    "empty protection": (
        "sinks: 4",
        "sinks:",
        "p.yaml:5:11: protect.sinks: should be a value for `count`, true or its parameters, got None.",
    ),
    "protect is a list": (
        "{sinks: 4, recent: 8}",
        "[sinks]",
        "p.yaml:5:1: protect: should be a mapping such as {sinks: 4, recent: 8}, got ['sinks'].",
    ),
    "post is no list": (
        "redundancy:",
        "post: rerotate\nredundancy:",
        "p.yaml:9:1: post: is a list such as [rerotate], got 'rerotate'.",
    ),
    "unknown post operation": (
        "redundancy:",
        "post: [rerotat]\nredundancy:",
        "p.yaml:9:8: post.0: unknown post 'rerotat'. Did you mean 'rerotate'? Known: <post>.",
    ),
    "component is a number": (
        "redundancy: key_cosine",
        "redundancy: 3",
        "p.yaml:9:1: redundancy: should be the name of a component or {use: name, ...}, got 3.",
    ),
    "use is a number": (
        "use: window_attention",
        "use: 3",
        "p.yaml:7:3: importance.use: should be the name of a component, got 3.",
    ),
    "empty field": (
        "redundancy: key_cosine",
        "redundancy:",
        "p.yaml:9:1: redundancy: is empty; write a value or remove the line.",
    ),
    "unknown field": (
        "protect:",
        "protects:",
        (
            "p.yaml:5:1: protects: there is no such field. Did you mean 'protect'? "
            "Fields: schema_version, policy, description, paper, departures, budget, phase, prefill_chunk, trigger, "
            "protect, importance, redundancy, mixer, allocator, selector, post, backend."
        ),
    ),
    "phase": (
        "redundancy:",
        "phase: decoding\nredundancy:",
        "p.yaml:9:1: phase: should be 'prefill', 'decode' or 'both', got 'decoding'. Did you mean 'decode'?",
    ),
    "chunk": (
        "redundancy:",
        "prefill_chunk: 0\nredundancy:",
        "p.yaml:9:1: prefill_chunk: should be greater than or equal to 1, got 0.",
    ),
    "departures as text": (
        "redundancy:",
        "departures: none\nredundancy:",
        "p.yaml:9:1: departures: should be a valid tuple, got 'none'.",
    ),
    "a departure as number": (
        "redundancy:",
        "departures:\n- ok\n- 3\nredundancy:",
        "p.yaml:11:3: departures.1: should be a valid string, got 3.",
    ),
    "name": (
        "policy: p",
        "policy: My Policy",
        (
            "p.yaml:2:1: policy: should be a name of at most 64 small letters, digits, dots, dashes and underscores, "
            "got 'My Policy'."
        ),
    ),
    "mixer missing": (
        "mixer: {use: linear, weight: 0.1}\n",
        "",
        (
            "p.yaml:1:1: mixer: is missing, and there is no default with redundancy 'key_cosine'; "
            "write for example {use: linear, weight: 0.1}."
        ),
    ),
    "budget missing": ("budget: {tokens: 64}\n", "", "p.yaml:1:1: budget: is missing; every policy says its budget."),
    "NaN": (
        "weight: 0.1",
        "weight: .nan",
        "p.yaml:10:22: mixer.weight: NaN is not a number that can be used; write a number.",
    ),
    "infinite": (
        "weight: 0.1",
        "weight: .inf",
        "p.yaml:10:22: mixer.weight: should be less than or equal to 1, got inf.",
    ),
    "budget below protection": (
        "tokens: 64",
        "tokens: 11",
        (
            "p.yaml:3:1: budget: 11 entries are fewer than the 12 that are protected (sinks 4, recent 8); "
            "raise the budget or protect less."
        ),
    ),
    "budget zero": (
        "tokens: 64",
        "tokens: 0",
        "p.yaml:3:10: budget.tokens: 0 is no budget; write at least 1 KV entry per head.",
    ),
    "budget negative": (
        "tokens: 64",
        "tokens: -3",
        "p.yaml:3:10: budget.tokens: -3 is no budget; write at least 1 KV entry per head.",
    ),
    "budget zero in short": (
        "{tokens: 64}",
        "0",
        "p.yaml:3:1: budget.tokens: 0 is no budget; write at least 1 KV entry per head.",
    ),
    "budget not whole": (
        "tokens: 64",
        "tokens: 64.5",
        "p.yaml:3:10: budget.tokens: should be a whole number of KV entries per head, got 64.5.",
    ),
    "budget true": (
        "tokens: 64",
        "tokens: true",
        "p.yaml:3:10: budget.tokens: should be a whole number of KV entries per head, got True.",
    ),
    "fraction zero": (
        "tokens: 64",
        "fraction: 0.0",
        "p.yaml:3:10: budget.fraction: should be above 0 and at most 1, got 0.",
    ),
    "fraction above one": (
        "tokens: 64",
        "fraction: 1.5",
        "p.yaml:3:10: budget.fraction: should be above 0 and at most 1, got 1.5; for 1.5 entries write {tokens: 1}.",
    ),
    "fraction infinite": (
        "tokens: 64",
        "fraction: .inf",
        "p.yaml:3:10: budget.fraction: should be above 0 and at most 1, got inf.",
    ),
    "fraction NaN": (
        "tokens: 64",
        "fraction: .NaN",
        "p.yaml:3:10: budget.fraction: NaN is not a number that can be used; write a number.",
    ),
    "tokens and fraction": (
        "tokens: 64",
        "tokens: 64, fraction: 0.5",
        "p.yaml:3:1: budget: both tokens and fraction are given; write one of them.",
    ),
    "neither": ("{tokens: 64}", "{}", "p.yaml:3:1: budget: neither tokens nor fraction is given; write one of them."),
    "budget key": (
        "tokens: 64",
        "token: 64",
        (
            "p.yaml:3:10: budget.token: there is no such key. Did you mean 'tokens'? "
            "Write {tokens: 512} or {fraction: 0.1}."
        ),
    ),
    "budget text": (
        "{tokens: 64}",
        "plenty",
        "p.yaml:3:1: budget: should be {tokens: 512} or {fraction: 0.1}, got 'plenty'.",
    ),
    "version missing": (
        "schema_version: 1\n",
        "",
        "p.yaml:1:1: schema_version: is missing; write `schema_version: 1` in the first line.",
    ),
    "version unknown": (
        "schema_version: 1",
        "schema_version: 2",
        "p.yaml:1:1: schema_version: 2 is not known here; this kvpolicy reads `schema_version: 1`.",
    ),
    "version as text": (
        "schema_version: 1",
        "schema_version: '1'",
        "p.yaml:1:1: schema_version: '1' is not known here; this kvpolicy reads `schema_version: 1`.",
    ),
    "version true": (
        "schema_version: 1",
        "schema_version: true",
        "p.yaml:1:1: schema_version: True is not known here; this kvpolicy reads `schema_version: 1`.",
    ),
    "name missing": (
        "policy: p\n",
        "",
        "p.yaml:1:1: policy: is missing; give the policy a name of its own, such as `policy: my-variant`.",
    ),
    "extends a number": (
        "redundancy:",
        "extends: 3\nredundancy:",
        "p.yaml:9:1: extends: should be the name or the path of one policy, got 3.",
    ),
    "extends nothing there": (
        "redundancy:",
        "extends: rvk\nredundancy:",
        "p.yaml:9:1: extends: unknown policy 'rvk'. Did you mean 'rkv'?",
    ),
    "extends a missing file": (
        "redundancy:",
        "extends: ./gone.yaml\nredundancy:",
        "p.yaml:9:1: extends: gone.yaml: there is no such file.",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), FIELDS.values(), ids=FIELDS)
def test_one_sentence_with_place_and_mend(old, new, message):
    expect_mistake(old, new, message)


def test_the_first_of_several_problems_is_shown_and_the_others_counted():
    text = GOOD.replace("  observe: 8\n", "  observe: 0\n  group: 3\n  smooth: x\n")
    assert error_of(text) == (
        "p.yaml:8:3: importance.observe: should be greater than or equal to 1, got 0. (2 more problems after this one.)"
    )


def test_unknown_names_have_their_own_class():
    with pytest.raises(UnknownComponentError):
        PolicySpec.from_yaml(GOOD.replace("key_cosine", "nothing"))
    with pytest.raises(UnknownComponentError):
        PolicySpec.from_yaml(GOOD + "extends: nothing\n")
    with pytest.raises(UnknownComponentError):
        kvpolicy.load("nothing")
