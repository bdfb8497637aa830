"""The promises of the runtime on a real model: SmolLM2-135M-Instruct in fp32."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

import kvpolicy
from kvpolicy.cache.store import BLOCK
from kvpolicy.runtimes.hf import ContextCache, PolicyCache, generate
from kvpolicy.study.needles import needle
from kvpolicy.tables import load_table, supplying
from kvsupport.alone import as_if_alone
from kvsupport.audit import audit
from kvsupport.oracle import compare
from kvsupport.trace import TracedCache

QUESTIONS = [
    "Hi.",
    "Explain why the sky is blue, in three sentences.",
    "Write a story about a fox who learns to count. The fox lives in a wood near a river; its best friend is an owl.",
    "List the planets.",
]


@pytest.fixture(autouse=True, scope="module")
def _gates_of_its_own(smollm2, tmp_path_factory):
    """Registered policies name gates of the shipped reasoner; here they get some that fit SmolLM2."""
    config, file = smollm2[0].config, tmp_path_factory.mktemp("gates") / "trim-kv.safetensors"
    heads, size, width = config.num_key_value_heads, config.hidden_size, 8
    g, tensors = torch.Generator().manual_seed(0), {}
    for i in range(config.num_hidden_layers):
        gate = f"model.layers.{i}.self_attn.retention_gate."
        for name, shape in (
            ("linear1.weight", (width, size)),
            ("linear1.bias", (width,)),
            ("linear2.weight", (heads, width)),
        ):
            tensors[gate + name] = torch.randn(shape, generator=g) / shape[-1] ** 0.5
        tensors[gate + "bias"] = torch.full((heads,), 4.0)
    save_file(tensors, file)
    own = {"reasoner/kvzap": "smollm2-135m/kvzap", "reasoner/trim-kv": str(file)}

    def supply(name, kind):
        return load_table(own[name], kind) if name in own else None

    with supplying(supply):
        yield


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = smollm2[1]
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len({len(prompt) for prompt in found}) == len(found)
    return found


def _greedy(smollm2, prompt, policy, tokens):
    """Return the text under a policy, or with the full cache, and the cache."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if policy is not None:
        return generate(smollm2[0], inputs, policy, **options)
    cache = DynamicCache(config=smollm2[0].config)
    return smollm2[0].generate(**inputs, past_key_values=cache, **options), cache


@pytest.mark.parametrize("name", ["rkv", "h2o"])
def test_a_row_of_a_batch_behaves_as_if_alone(name, smollm2, prompts, small):
    """A short look at what the slow test of four rows does with nine policies over 300 tokens."""
    policy = small(name, 48, 16)
    report = as_if_alone(smollm2[0], policy, prompts, 40)
    print(name, report)
    assert report.ok, report
    assert report.decisions >= 4 * 2 * 30 * 2


def test_below_the_budget_the_text_is_that_of_the_full_cache(smollm2, prompts):
    wanted, _ = _greedy(smollm2, prompts[1], None, 64)
    got, cache = _greedy(smollm2, prompts[1], "rkv", 64)
    assert torch.equal(got, wanted)
    assert cache.stats().evicted == 0


def test_the_oracle_agrees(smollm2, prompts, small):
    """A short look at what the slow test of 1,100 tokens does at length."""
    policy = small("rkv", 48, 16)
    with TracedCache(policy, smollm2[0]) as cache:
        ids = torch.tensor([prompts[2]])
        smollm2[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=48,
            min_new_tokens=48,
            past_key_values=cache,
        )
        cache.settled()
    report = compare(cache.trace, policy)
    print(report)
    assert report.ok, report
    assert report.decisions >= 3 * 90


@pytest.fixture(scope="module")
def long_prompts(smollm2):
    """Two prompts of some 150 and 90 tokens, so that a quarter of the text is less than either."""
    lines = [
        f"{n}. The owl asks the fox what {n} and {n + 3} make, and the fox counts on its paws." for n in range(2, 9)
    ]
    tokenizer = smollm2[1]
    return [tokenizer("\n".join(lines[:count]) + "\nThe fox says")["input_ids"] for count in (7, 4)]


@pytest.fixture(scope="module")
def full_text(smollm2, prompts):
    """100 tokens with the full cache."""
    return _greedy(smollm2, prompts[1], None, 100)[0]


@pytest.mark.slow
def test_below_the_budget_every_policy_writes_the_text_of_the_full_cache(registered, smollm2, prompts, full_text):
    got, cache = _greedy(smollm2, prompts[1], registered, 100)
    assert torch.equal(got, full_text)
    assert cache.stats().evicted == 0


@pytest.mark.slow
def test_every_policy_at_a_quarter_of_the_text(registered, smollm2, long_prompts, small):
    """In a left-padded batch as if alone, with exactly the budget over all heads and layers, and exact attention."""
    model, steps = smollm2[0], 60
    if any(type(part).__name__ == "Prompt" for part in kvpolicy.load(registered).build().protections):
        # A quarter of the text must hold the pinned prompt.
        long_prompts, steps = [prompt[:length] for prompt, length in zip(long_prompts, (9, 5), strict=True)], 100
    budget = (len(long_prompts[0]) + steps) // 4
    policy = small(registered, budget, 16)
    alone = as_if_alone(model, policy, long_prompts, steps)
    print(registered, budget, alone)
    assert alone.ok, alone
    assert (alone.decisions == 0) == (registered == "full"), alone
    with TracedCache(policy, model, outputs=True) as cache:
        generate(
            model, {"input_ids": torch.tensor([long_prompts[0]])}, cache, do_sample=False, max_new_tokens=steps,
            min_new_tokens=steps,
        )  # fmt: skip
        cache.settled()
    report = audit(cache.trace, policy)
    print(registered, report)
    assert report.ok, report
    assert (report.evictions == 0) == (registered == "full"), report
    assert report.output_error < 1e-3


CORE = ("rkv", "rkv-code", "rkv-paper", "snapkv", "h2o", "streaming-llm", "sinks-recent", "random-pinned", "knorm")


@pytest.mark.slow
@pytest.mark.parametrize("name", CORE)
def test_four_rows_of_300_tokens_as_if_alone(name, smollm2, prompts, small):
    report = as_if_alone(smollm2[0], small(name, 96, 32), prompts, 300)
    print(name, report)
    assert report.ok, report
    assert report.decisions > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CORE)
def test_the_oracle_agrees_over_100_tokens(name, smollm2, prompts, small):
    policy = small(name, 96, 32)
    with TracedCache(policy, smollm2[0]) as cache:
        generate(
            smollm2[0], {"input_ids": torch.tensor([prompts[2]])}, cache, do_sample=False, max_new_tokens=100,
            min_new_tokens=100,
        )  # fmt: skip
        cache.settled()
    report = compare(cache.trace, policy)
    print(name, report)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adakv-snapkv", "pyramidkv"])
def test_what_head_wise_policies_hold_is_what_they_allocate(name, smollm2, long_prompts, small):
    budget, steps = 40, 30
    _, cache = _greedy(smollm2, long_prompts[0], small(name, budget, 16), steps)
    stats, engine = cache.stats(), cache.engine
    counts = [[len(cache.kept(layer, head)) for head in range(3)] for layer in range(30)]
    held, entry = sum(map(sum, counts)), 2 * 64 * 4
    assert len({n for layer in counts for n in layer}) > 5
    assert held == (budget + steps - 1) * 90
    tensors = sum(
        sum(arena[store.index[layer]].nbytes for arena in (store.keys, store.values))
        + sum(store.bases[layer].arenas[kind].nbytes for kind in ("keys", "values"))
        for layer, store in engine.stores.items()
    )
    assert stats.bytes_resident == held * entry
    assert stats.bytes_allocated == tensors
    assert held * entry <= tensors < (held + 2 * BLOCK * 90) * entry  # a block for the base, one for the tail


@pytest.mark.slow
def test_a_head_wise_policy_stays_bounded_over_2000_tokens(smollm2, prompts):
    spec = kvpolicy.load("rkv-pyramid", budget=128, trigger__interval=64)
    policy = spec.build()
    assert policy.phase == "decode"
    with torch.no_grad(), PolicyCache(policy, smollm2[0]) as cache:
        token, most = torch.tensor([prompts[2]]), 0
        for step in range(2000):
            logits = smollm2[0](token, past_key_values=cache).logits[:, -1]
            token = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=torch.Generator().manual_seed(step))
            if step % 16 == 15:
                stores = {id(store): store for store in cache.engine.stores.values()}.values()
                tails = cache.engine.held(slice(None)).lengths
                most = max(most, sum(sum(s.entries(layer, tails)) for s in stores for layer in s.layers))
        stats = cache.stats()
    assert stats.compactions >= 28
    assert most <= policy.bound * 90
    assert stats.peak_resident <= policy.bound
    assert stats.bytes_allocated < (policy.bound + 2 * BLOCK) * 90 * 2 * 64 * 4


@pytest.mark.slow
def test_rkv_over_1100_tokens(smollm2, prompts):
    """No head ever holds more than budget and interval, and the kept positions are the oracle's."""
    policy = kvpolicy.load("rkv", budget=256, trigger__interval=128).build()
    with TracedCache(policy, smollm2[0]) as cache:
        ids = torch.tensor([prompts[2]])
        smollm2[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=1100,
            min_new_tokens=1100,
            past_key_values=cache,
        )
        cache.settled()
        stats = cache.stats()
    assert stats.peak_resident == 384
    for done in cache.trace.passes:
        assert all(len(held) <= 384 for noted in done.layers.values() for row in noted.held for held in row)
    entry = 2 * 3 * 64 * 4
    assert stats.bytes_allocated == 30 * 384 * entry
    report = compare(cache.trace, policy)
    print(report)
    assert report.ok, report
    assert report.decisions == 90 * ((len(prompts[2]) + 1099 - 256) // 128)


def test_one_context_and_many_questions(smollm2):
    """With everything kept it is plain generation; otherwise half is kept, and questions do not touch each other."""
    model, tokenizer = smollm2
    text, question, answer = needle(1, 120, 1)
    question = question.strip()
    with ContextCache("full", model, tokenizer, text) as context:
        reply = context.reply(question, max_new_tokens=16)
        messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        whole = tokenizer.apply_chat_template(messages, **options)
        plain = model.generate(**whole, do_sample=False, max_new_tokens=16)
        assert plain[0].tolist() == [*whole["input_ids"][0].tolist(), *reply.tokens]
        assert reply.prompt_tokens == whole["input_ids"].shape[1]
    assert answer in reply.text
    with ContextCache(kvpolicy.load("snapkv-prefill", 0.5), model, tokenizer, text, chunk=64) as context:
        first = context.ask([question, "What is this text about?"], max_new_tokens=8)
        assert context.ask(question, max_new_tokens=8) == first[0] != first[1]
        stats = context.stats()
    assert stats.resident == -(-stats.seen // 2)
    assert stats.peak_resident < stats.seen
