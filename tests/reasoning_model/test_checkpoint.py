"""The shipped model: small, ordinary, right on held-out problems, and worse when what it needs is evicted."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpolicy.runtimes.opening import REASONER, locate
from kvpolicy.study.tasks import LEVELS, REDUNDANCIES, grade, problems

ROOT = Path(__file__).resolve().parents[2]
FOLDER = locate(REASONER, user="the test")
KINDS = [(family, times) for family in LEVELS for times in REDUNDANCIES[family]]
CELLS = [(family, level, times) for family, times in KINDS for level in LEVELS[family]]


@pytest.fixture(scope="module")
def evaluation():
    path = ROOT / "examples" / "reasoning_model" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("reasoning_model_evaluate", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def reasoner():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


def accuracy(evaluation, reasoner, family, level, policy, count, *, times=None, share=0.2):
    chosen = list(problems(family, level, "test", count, redundancy=times))
    spec = evaluation.policy_at(policy, chosen, share, 32)
    grades = evaluation.grades(*reasoner, chosen, spec, 25)
    assert len(grades) == count
    return sum(g.exact for g in grades) / count


def test_folder_is_small_and_complete(reasoner):
    model, tokenizer = reasoner
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 5_000_000
    assert model.dtype == torch.float32
    assert type(model).__module__.startswith("transformers.models.qwen3")
    assert 500_000 < model.num_parameters() < 1_500_000
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert tokenizer.padding_side == "left"
    card = (FOLDER / "README.md").read_text()
    with (FOLDER / "training_log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert f"{log[-1]['step']} steps" in card.replace(",", "")
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)


def test_tokenizer_knows_every_word(reasoner):
    tokenizer = reasoner[1]
    for family, level, times in CELLS:
        for problem in problems(family, level, "test", 5, redundancy=times):
            text = f"{problem.prompt} {problem.solution} <eos>"
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == f"{problem.prompt} {problem.solution}"


@pytest.mark.parametrize(("family", "times"), KINDS)
def test_answers_held_out_problems(evaluation, reasoner, family, times):
    assert accuracy(evaluation, reasoner, family, "short", "full", 8, times=times) == 1


@pytest.mark.parametrize(("family", "times"), KINDS)
def test_teacher_forced_solutions(reasoner, family, times):
    """One forward pass: the best token is the right one all along, so greedy decoding gives the solution."""
    model, tokenizer = reasoner
    right = 0
    chosen = list(problems(family, "long", "test", 4, redundancy=times))
    for problem in chosen:
        ids = tokenizer(f"{problem.prompt} {problem.solution} <eos>", return_tensors="pt")["input_ids"]
        start = len(problem.prompt.split()) + 1
        with torch.inference_mode():
            best = model(ids).logits[0, :-1].argmax(-1)
        right += bool((best == ids[0, 1:])[start - 1 :].all())
    assert right >= len(chosen) - 1


def test_greedy_is_the_default_and_generate_stops(reasoner):
    model, tokenizer = reasoner
    (problem,) = problems("prompt-recall", "short", "development", 1)
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=700)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert text == f"{problem.solution} <eos>"
    assert grade(problem, text).exact


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("family", "level", "times"), CELLS)
def test_full_cache_accuracy(evaluation, reasoner, family, level, times):
    assert accuracy(evaluation, reasoner, family, level, "full", 100, times=times) >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", ["prompt-recall", "trace-recall"])
def test_eviction_matters_and_not_every_method_is_at_zero(evaluation, reasoner, family):
    """At a fifth of the trace the controls fail; some method still answers, so that methods can be told apart."""
    for policy in ("sinks-recent", "random"):
        assert accuracy(evaluation, reasoner, family, "medium", policy, 25) <= 0.5
    best = max(accuracy(evaluation, reasoner, family, "medium", policy, 25) for policy in ("rkv", "recent-pinned"))
    assert best >= 0.2
