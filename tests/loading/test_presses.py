"""What kvpress's users write, and where they are led."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy.errors import SpecError, UnknownComponentError
from kvpolicy.loading.presses import INSTEAD, NOTHING, PAGE, POLICIES, lead

ROOT = Path(__file__).parents[2]


def test_every_press_of_the_page_is_led_somewhere_and_nothing_else_is():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    table = page.partition("## Which policy for which press")[2].partition("\n### ")[0]
    named = set(re.findall(r"`(\w+Press)\b", table))
    assert len(named) > 40
    assert named == {*POLICIES, *INSTEAD, *NOTHING}
    nothing = next(line for line in table.splitlines() if line.startswith("| `KVzipPress`"))
    assert {f"`{press}`" in nothing for press in NOTHING} == {True}


def test_where_they_are_led_there_is_something():
    catalog = kvpolicy.catalog()
    assert set(POLICIES.values()) <= set(catalog.names("policy"))
    for kind, name in (("importance", "leverage"), ("importance", "non_causal"), ("post", "rerotate")):
        assert name in catalog.names(kind)
    assert {"merge_values"} <= set(catalog.names("post"))


@pytest.mark.parametrize("name", ["SnapKVPress", "snapkv_press", "snapkv-press", "SnapKV"])
def test_a_press_leads_to_its_policy_without_the_list_of_all(name):
    with pytest.raises(UnknownComponentError) as caught:
        kvpolicy.load(name)
    said = f"unknown policy {name!r}. For kvpress's SnapKVPress take the policy 'snapkv-prefill' ({PAGE})."
    assert str(caught.value) == said


def test_what_is_no_policy_is_said_with_what_to_write_and_a_common_word_is_no_press():
    assert (
        lead("KeyRerotationPress") == f"For kvpress's KeyRerotationPress write `post: [rerotate]` in a policy ({PAGE})."
    )
    assert lead("KVzip") == f"Nothing here takes the place of kvpress's KVzipPress ({PAGE} says why)."
    assert [lead(word) for word in ("decoding", "merging", "rkw", "")] == [""] * 4


@pytest.mark.parametrize(
    ("name", "meant"), [("snapkv_prefill", "snapkv-prefill"), ("RKV", "rkv"), ("pinned", "random-pinned")]
)
def test_another_spelling_or_a_part_of_a_name_leads_to_the_policy(name, meant):
    with pytest.raises(UnknownComponentError, match=f"Did you mean '{meant}'"):
        kvpolicy.load(name)


def test_a_name_that_is_spelt_alike_in_its_own_kind_goes_before_that_of_another():
    with pytest.raises(UnknownComponentError, match="Did you mean 'lazy-eviction'"):
        kvpolicy.load("lazyeviction")


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="it is installed")
def test_the_component_of_kvpress_names_its_extra():
    with pytest.raises(
        SpecError, match=r"importance: 'kvpress' runs .* install it with: pip install 'kvpolicy\[kvpress\]'\."
    ):
        kvpolicy.load("knorm", importance={"use": "kvpress", "press": "KeyDiffPress"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window_size": 64}, r"`importance: \{use: window_attention, observe: 64\}` and.* `protect: \{recent: 64\}`"),
        ({"kernel_size": 5}, r"`importance: \{use: window_attention, smooth: 5\}`"),
        ({"n_sink": 4}, r"`protect: \{sinks: 4\}`"),
        ({"target_size": 512}, r"`budget: \{tokens: 512\}`"),
        ({"compression_interval": 64}, r"`trigger: \{every: 64\}`"),
        ({"press": "x"}, "A press is a policy here"),
        ({"ratio": 0.7}, "there is no field 'ratio'. Fields: schema_version, policy, .*backend\\.$"),
        ({"trigger": "prefill"}, "When compactions may happen is `phase: prefill`"),
    ],
)
def test_a_parameter_of_kvpress_says_what_is_written_here(given, said):
    with pytest.raises(SpecError, match=said):
        kvpolicy.load("snapkv-prefill", **given)


@pytest.mark.parametrize(
    "changes",
    [
        {"importance": {"use": "window_attention", "observe": 64}, "protect": {"recent": 64}},
        {"importance": {"use": "window_attention", "smooth": 5}},
        {"protect": {"sinks": 4}},
        {"trigger": {"every": 64}},
        {"post": ["rerotate"]},
        {"phase": "prefill", "trigger": "each_step"},
        {"allocator": "pyramid"},
        {"prefill_chunk": 1024},
    ],
)
def test_what_is_recommended_is_valid(changes):
    kvpolicy.load("snapkv-prefill", budget=512, **changes).build()
