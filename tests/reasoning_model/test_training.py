"""The training script: reproducible, resumable, and its result loads with the Auto classes."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reasoning_model" / "train.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reasoning_model_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


def options(script, length=4):
    parts = tuple(script.Part(1, family, "full", (2, 3)) for family in ("prompt-recall", "trace-recall"))
    return {"seed": 3, "peak": 1e-3, "save_every": 2, "curriculum": (script.Stage(length, parts, tokens=400),)}


def test_two_steps_and_on_from_there(script, tmp_path):
    """A run that is stopped and taken up again ends with the weights of one that was not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script.train(tmp_path / "a", stop=2, **options(script))
    script.train(tmp_path / "a", stop=None, **options(script))
    script.train(tmp_path / "b", stop=None, **options(script))
    stopped, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "model") for run in "ab")
    assert type(whole).__name__ == "Qwen3ForCausalLM"
    for one, other in zip(stopped.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    untrained = script.build_model(script.build_tokenizer(), 3, script.SHIPPED)
    assert any(
        not torch.equal(one, other) for one, other in zip(whole.parameters(), untrained.parameters(), strict=True)
    )
    with (tmp_path / "a" / "model" / "training_log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert log[0]["step"] == "2"
    assert log[-1]["step"] == "4"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert tokenizer("ann 3 stop .")["input_ids"] == script.build_tokenizer()("ann 3 stop .")["input_ids"]


@pytest.mark.parametrize(
    ("shape", "architecture"),
    [((8, 1, 64, 1e4, False), "LlamaForCausalLM"), ((2, 2, 128, 5e5, True), "Qwen3ForCausalLM")],
)
def test_another_shape(script, tmp_path, shape, architecture):
    """A model of another shape is trained and saved as what it is."""
    from transformers import AutoModelForCausalLM

    script.train(tmp_path, stop=1, shape=script.Shape(*shape), **options(script))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == architecture
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (*heads, config.rope_parameters["rope_theta"]) == shape[:4]


def test_batches(script):
    """Only solutions are graded, rows start with <bos>, and a batch depends on nothing but step and seed."""
    tokenizer = script.build_tokenizer()
    encode = tokenizer.get_vocab()
    forms = set()
    for number, stage in enumerate(script.CURRICULUM):
        for step in range(12):
            part, tokens, labels = script.batch(step, number, stage, encode)
            again = script.batch(step, number, stage, encode)
            assert torch.equal(tokens, again[1])
            lengths = [int((row != encode["<pad>"]).sum()) for row in tokens]
            assert len(tokens) == 1 or len(tokens) * max(lengths[:-1]) <= stage.tokens
            forms.add((part.family, part.form))
            for row, wanted in zip(tokens, labels, strict=True):
                graded = wanted != script.IGNORED
                assert row[0] == encode["<bos>"]
                assert torch.equal(row[graded], wanted[graded])
                words = tokenizer.convert_ids_to_tokens(row.tolist())
                assert "<unk>" not in words
                if part.form == "sum":
                    assert sums_are_right(words, graded.tolist())
                    continue
                assert not graded[: words.index("<think>") + 1].any()
                if part.form != "recall":
                    assert wanted[graded][-1] == encode["<eos>"]
    assert len(forms) == 13


def sums_are_right(words, graded):
    """The graded words are the results, and each is right modulo 10 or 100."""
    text = " ".join(words)
    known = [(b, d, r) for b, d, r in re.findall(r"so ([\d ]+) plus (\d) is ([\d ]+) \.", text)]
    known += [(b, d, r) for d, b, r in re.findall(r"adding (\d) to ([\d ]+) gives ([\d ]+) \.", text)]
    right = all(
        (int(b.replace(" ", "")) + int(d)) % 10 ** len(r.split()) == int(r.replace(" ", "")) for b, d, r in known
    )
    return known and right and sum(graded) == sum(len(r.split()) for *_, r in known)


def test_learning_rate(script):
    """Warm-up, a plateau, a decay to 2 %; a restarted stage decays again from its own height."""
    part = script.Part(1, "prompt-recall", "full", (2, 3))
    stages = (script.Stage(1000, (part,)), script.Stage(500, (part,), restart=0.3))
    rate = [script.learning_rate(step, stages, 2.0) for step in range(1500)]
    assert rate[0] == pytest.approx(2 / 60)
    assert rate[60:501] == [2.0] * 441
    assert rate[750] == pytest.approx(2 * 0.51)
    assert rate[999] == pytest.approx(0.04, rel=0.01)
    assert rate[1000] == pytest.approx(0.6)
    assert rate[1499] == pytest.approx(0.04, rel=0.01)
    assert all(a >= b for a, b in pairwise(rate[60:1000]))


def test_published_sizes_are_trained(script):
    from kvpolicy.study.tasks import LEVELS

    for family, levels in LEVELS.items():
        ranges = [part.steps for part in script.CURRICULUM[-1].parts if part.family == family]
        assert {part.form for part in script.CURRICULUM[-1].parts} == {"full"}
        for size in levels.values():
            assert any(low <= size.steps <= high for low, high in ranges)


def test_tokenizer_round_trip(script):
    from kvpolicy.study.tasks import REDUNDANCIES, problems

    tokenizer = script.build_tokenizer()
    for family, times in REDUNDANCIES.items():
        for problem in problems(family, "short", "test", 5, redundancy=times[-1]):
            text = f"{problem.prompt} {problem.solution}"
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert len(ids) == len(text.split()) + 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
