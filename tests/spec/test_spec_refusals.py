"""What is no specification: files, overrides, Python values, and anything at all."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import BudgetError, ImportanceScorer, KVPolicyError, PolicySpec, SpecError
from kvpolicy.loading import installed
from kvsupport.spec_good import GOOD, error_of

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


CONTENTS = {
    "empty": (b"", "{path}: is empty; write at least schema_version, policy, budget, trigger and importance."),
    "comments only": (b"# nothing\n\n", "{path}: is empty; "),
    "null": (b"~\n", "{path}: is empty; "),
    "list": (b"- a\n- b\n", "{path}:1:1: is a list; a policy file is a mapping of `field: value` lines."),
    "text": (b"hello\n", "{path}:1:1: is a single value; a policy file is a mapping"),
    "latin-1": ("description: é".encode("latin-1"), "{path}: is not UTF-8 text (byte 13); give a policy file."),
    "binary": (bytes(range(256)), "{path}: is not UTF-8 text (byte 128)"),
    "zeros": (b"\x00" * 64, "{path}: is not text (character 0 is U+0000); give a YAML file."),
    "UTF-16": ("policy: x".encode("utf-16"), "{path}: is not UTF-8 text (byte 0)"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "{path}: is not text (character 4 is U+0003)"),
    "alias bomb": (BOMB.encode(), "{path}:1:4: anchors such as `&a` are not allowed"),
    "deep": (b"a: " + b"[" * 500 + b"]" * 500, "{path}:1:35: nested more than 32 levels deep; that is not a policy."),
    "very deep": (b"a: " + b"[" * 200_000, "{path}:1:35: nested more than 32 levels deep"),
    "many values": (b"a: [" + b"1," * 100_000 + b"]", "has more than 5000 values; that is not a policy."),
    "large": (b"#" * (1 << 20) + b"\n", "{path}: is larger than 1024 KiB; that is not a policy file."),
    "long number": (
        b"schema_version: 1\npolicy: p\ntrigger: each_step\nimportance: key_norm\nbudget: " + b"9" * 6000,
        "{path}:5:9: 9999999999... is a number of 6,000 characters; write at most 100.",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_files_that_are_no_policy(tmp_path, content, message):
    file = tmp_path / "p.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_file(file)
    assert message.format(path=file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(SpecError, match="is a directory; give one policy file"):
        kvpolicy.load(tmp_path)
    with pytest.raises(SpecError, match=r"gone\.yaml: there is no such file"):
        kvpolicy.load(tmp_path / "gone.yaml")
    with pytest.raises(SpecError, match="is not an ordinary file"):
        kvpolicy.load("/dev/null")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(SpecError, match="is not an ordinary file"):
        kvpolicy.load(tmp_path / "pipe.yaml")
    for nonsense in ("", "a\0b"):
        with pytest.raises(SpecError, match="is not the name or path of a policy"):
            kvpolicy.load(nonsense)
    with pytest.raises(SpecError, match="no-such-folder: there is no such folder"):
        kvpolicy.load("mine", search=tmp_path / "no-such-folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text(GOOD)
    file.chmod(0)
    with pytest.raises(SpecError, match=r"cannot be read \(Permission denied\)"):
        kvpolicy.load(file)


FIELDS = f" Fields: {', '.join(PolicySpec.model_fields)}."


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "mixer.wieght",
            0.3,
            "mixer.wieght: 'linear' has no such parameter. Did you mean 'weight'? Parameters: weight.",
        ),
        ("mixr.weight", 0.3, "mixr.weight: there is no field 'mixr'. Did you mean 'mixer'?" + FIELDS),
        ("weight", 0.3, "weight: there is no field 'weight'." + FIELDS),
        ("mixer.weight", "much", "mixer.weight: should be a valid number, got 'much'."),
        ("mixer.weight", float("nan"), "mixer.weight: NaN is not a number that can be used; write a number."),
        (
            "mixer.weight",
            object,
            "mixer.weight: a type cannot be written in a policy file; give a number, text, list or mapping.",
        ),
        ("mixer.weight.x", 1, "mixer.weight: should be a valid number, got {'x': 1}."),
        ("budget", None, "budget: is empty; write a value or remove the line."),
        ("budget.entries", 3, "budget.entries: there is no such key. Write {tokens: 512} or {fraction: 0.1}."),
        ("phase.x", 1, "phase.x: `phase` has no named parts; replace 'phase' as a whole."),
        ("post.0", "rerotate", "post.0: `post` has no named parts; replace 'post' as a whole."),
        ("", 1, "'' is not a path; write field.parameter, such as 'mixer.weight'."),
        ("mixer..weight", 1, "'mixer..weight' is not a path; write field.parameter, such as 'mixer.weight'."),
        (3, 1, "3 is not a path; write field.parameter, such as 'mixer.weight'."),
        ("extends", "h2o", "extends: there is no field 'extends'." + FIELDS),
    ],
)
def test_replace_says_what_is_wrong(path, value, message):
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_yaml(GOOD).replace(path, value)
    assert str(caught.value) == message


def test_python_construction_raises_the_same_errors():
    good = PolicySpec.from_yaml(GOOD).to_data()
    with pytest.raises(SpecError, match=r"^budgt: there is no such field\. Did you mean 'budget'"):
        PolicySpec(**good, budgt=3)
    with pytest.raises(SpecError, match=r"^importance: should be a component of kind importance, got Linear"):
        PolicySpec(**{**good, "importance": kvpolicy.catalog().get("mixer", "linear")()})
    with pytest.raises(SpecError, match=r"^budget: 3 entries are fewer than the 12"):
        PolicySpec(**{**good, "budget": 3})
    with pytest.raises(SpecError, match=r"^policy: is missing"):
        PolicySpec(budget=3)
    with pytest.raises(SpecError, match=r"^mixer\.weight: should be less than or equal to 1"):
        kvpolicy.load("rkv", mixer__weight=3)


class Fussy(ImportanceScorer):
    size: int | None = None

    def model_post_init(self, context):
        if self.size == 13:
            raise ValueError("13 is unlucky.")

    def observed_queries(self):
        if self.size == 14:
            raise BudgetError("budget: 14 is too much for Fussy.")
        return 0

    def score(self, view):
        raise NotImplementedError


def test_components_may_refuse_in_their_own_words():
    catalog = installed.load_catalog()
    catalog.register("fussy", Fussy)
    text = GOOD.replace("window_attention\n  observe: 8", "fussy\n  size: 12")
    with installed.using(catalog):
        PolicySpec.from_yaml(text)
        assert error_of(text.replace("12", "13")) == "p.yaml:6:1: importance: 13 is unlucky."
        assert error_of(text.replace("12", "x")) == "p.yaml:8:3: importance.size: should be a valid integer, got 'x'."


def outcome(call):
    """Return (None, result), or the one line of a KVPolicyError and None; any other exception is a failure."""
    try:
        return None, call()
    except KVPolicyError as error:
        (line,) = str(error).splitlines() or [""]
        return line, None


@given(st.data())
def test_a_damaged_file_never_ends_in_a_traceback(data):
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, min(start + 12, len(GOOD))))
    insert = data.draw(st.text("{}[]:,-!&*#?|>'\"%@`~ \n\taeu01.\x00\x85\ufeff", max_size=6) | st.text(max_size=6))
    message, _ = outcome(lambda: PolicySpec.from_yaml(GOOD[:start] + insert + GOOD[end:], "p.yaml"))
    assert message is None or message.startswith("p.yaml:")


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.sampled_from(["none", "linear", "x", "", "every"])
)


_TREES = st.recursive(
    _LEAVES,
    lambda t: (
        st.lists(t, max_size=2)
        | st.dictionaries(
            st.sampled_from(["use", "tokens", "fraction", "every", "count", "sinks", "weight", "x"]), t, max_size=2
        )
    ),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(PolicySpec.model_fields)), value=_TREES)
def test_any_value_in_any_field_is_taken_or_refused_in_a_sentence(field, value):
    good = kvpolicy.load("rkv")
    message, changed = outcome(lambda: good.replace(field, value))
    if message is None:
        assert PolicySpec.from_yaml(changed.to_yaml()) == changed
    else:
        assert message.startswith(field)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("sinks: 4", "sinks: {use: recent}", "p.yaml:5:19: protect.sinks.use: the component is 'sinks' already"),
        ("sinks: 4", "sinks: {use: 3}", "p.yaml:5:19: protect.sinks.use: the component is 'sinks' already"),
        (
            "{every: 16}",
            "{every: {use: each_step}}",
            "p.yaml:4:19: trigger.every.use: the component is 'every' already",
        ),
    ],
)
def test_a_component_is_named_once(old, new, where):
    assert error_of(GOOD.replace(old, new)) == f"{where}; remove `use`."
