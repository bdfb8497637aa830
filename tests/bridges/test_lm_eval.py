"""lm-evaluation-harness under a policy; runs where lm-eval is installed."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvpolicy[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from kvpolicy import SpecError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.lm_eval import PolicyLM
from kvpolicy.testing.tiny import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

CONTEXT = "the quick brown fox jumps over the lazy dog and runs away through the dark wood"
OTHER = " while it rains and rains and nobody comes to look for it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def common(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<s>", eos_token="</s>")
    return {"pretrained": folder, "tokenizer": tokenizer, "device": "cpu", "dtype": "float32"}


def model(common, policy, budget=None, **options):
    return PolicyLM(policy=policy, budget=budget, **common, **options)


def tokens_of(lm, *pairs):
    return [((c, t), lm.tok_encode(c), lm.tok_encode(t)) for c, t in pairs]


def test_without_eviction_likelihoods_are_those_of_the_harness(common):
    ours, plain = model(common, "full"), HFLM(**common)
    requests = tokens_of(ours, (CONTEXT, OTHER), (CONTEXT, " no"), (OTHER, CONTEXT), (CONTEXT, " a dog"))
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    for (one, greedy), (other, other_greedy) in zip(
        ours._loglikelihood_tokens(requests, disable_tqdm=True), expected, strict=True
    ):
        assert one == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy


def test_with_eviction_likelihoods_are_those_of_the_policy(common, tmp_path):
    policy = tmp_path / "often.yaml"
    policy.write_text("schema_version: 1\npolicy: often\nextends: rkv\ntrigger: {every: 8}\n")
    lm = model(common, str(policy), budget=24)
    (request,) = tokens_of(lm, (CONTEXT, OTHER))
    (_, context, continuation) = request
    with PolicyCache(lm.spec, lm.model) as cache, torch.no_grad():
        logits = lm.model(torch.tensor([context]), past_key_values=cache).logits[:, -1]
        total = 0.0
        for token in continuation:
            total += float(logits.log_softmax(-1)[0, token])
            logits = lm.model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
    (both, alone) = lm._loglikelihood_tokens([request, *tokens_of(lm, (CONTEXT, " no"))], disable_tqdm=True)
    assert both[0] == pytest.approx(total, abs=1e-4)
    ((full, _),) = model(common, "full")._loglikelihood_tokens([request], disable_tqdm=True)
    assert abs(full - both[0]) > 1e-2  # the policy has evicted, and it shows
    assert alone == lm._loglikelihood_tokens(tokens_of(lm, (CONTEXT, " no")), disable_tqdm=True)[0]


def test_generation_is_that_of_the_policy(common):
    lm = model(common, "recent-pinned", budget=96, batch_size=2)
    ids = torch.tensor([lm.tok_encode(CONTEXT)])
    made = lm._model_generate(ids, ids.shape[1] + 30, ["zzz"], attention_mask=torch.ones_like(ids))
    with PolicyCache(lm.spec, lm.model) as cache:
        expected = lm.model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert torch.equal(made, expected)
    with pytest.raises(UnsupportedError, match="num_beams: 2"):
        lm._model_generate(ids, 120, ["zzz"], num_beams=2)


def test_what_is_wrong_is_said_at_once(common):
    with pytest.raises(SpecError, match="Did you mean 'rkv'"):
        model(common, "rkw")
    with pytest.raises(UnsupportedError, match="follows no policy"):
        model(common, "full")._model_call(torch.ones(1, 4, dtype=torch.int64))


TASK = """\
task: kvpolicy_tiny
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
metadata: {version: 1}
"""


def local_task(folder, rows):
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "kvpolicy_tiny.yaml").write_text(TASK.replace("FILE", str(folder / "rows.json")))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.slow
def test_a_task_runs_from_end_to_end(smollm2, tmp_path):
    facts = [
        ("The capital of France is", " Paris", " Oslo"),
        ("Two plus two is", " four", " nine"),
        ("Ice is frozen", " water", " paper"),
        ("The opposite of hot is", " cold", " green"),
    ]
    text = "Here are some sentences that everybody knows. The sun rises in the east. Fish live in water. " * 4
    rows = [{"question": text + q, "choices": [a, b], "answer": 0} for q, a, b in facts]
    language_model, tokenizer = smollm2
    lm = PolicyLM(pretrained=language_model, tokenizer=tokenizer, policy="snapkv-prefill", budget=48)
    done = simple_evaluate(
        model=lm, tasks=["kvpolicy_tiny"], task_manager=local_task(tmp_path, rows), bootstrap_iters=0
    )
    assert done["results"]["kvpolicy_tiny"]["acc,none"] >= 0.75
