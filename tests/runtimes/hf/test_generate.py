"""What `model.generate` can do, it does with a `PolicyCache`."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvsupport.events import Crop, RowsTaken
from kvsupport.generating import ACCUMULATED, POLICIES, STREAMING
from kvsupport.oracle import compare
from kvsupport.trace import TracedCache

ROOMY = 200


@pytest.fixture
def full(tiny):
    """Make the text that the full cache gives."""

    def make(inputs, **options):
        torch.manual_seed(1)
        return tiny().generate(**inputs, past_key_values=DynamicCache(config=tiny().config), **options)

    return make


def _valid_sets(cache):
    """Every head holds strictly increasing positions that have been seen, its sinks and its newest tokens."""
    for row, counters in enumerate(cache.engine.rows):
        for layer in cache.engine.layers:
            for head in range(cache.engine.stores[layer].layout.heads):
                kept = cache.kept(layer, head, row)
                assert kept == sorted(set(kept))
                assert kept[:2] == [0, 1]
                assert kept[-8:] == list(range(counters.seen - 8, counters.seen))
                assert len(kept) == counters.resident <= 32


OPTIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_below_the_budget_every_mode_gives_what_the_full_cache_gives(
    options, policy, tiny, compose, random_prompts, padded, full
):
    inputs = padded(random_prompts(20, 11))
    wanted = full(inputs, **options, max_new_tokens=30)
    with PolicyCache(compose(**policy, budget=ROOMY), tiny()) as cache:
        torch.manual_seed(1)
        got = tiny().generate(**inputs, **options, max_new_tokens=30, past_key_values=cache)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_above_the_budget_every_mode_keeps_what_the_oracle_keeps(
    options, policy, tiny, compose, random_prompts, padded
):
    policy = compose(**policy)
    with TracedCache(policy, tiny(), outputs=True) as cache:
        tiny().generate(**padded(random_prompts(20, 11)), **options, max_new_tokens=30, past_key_values=cache)
        cache.settled()
        _valid_sets(cache)
        assert cache.stats().evicted > 0
    assert any(isinstance(event, RowsTaken) for event in cache.trace.events) == ("num_beams" in options)
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.output_error < 1e-4


def test_one_call_generates_with_chunks_and_beams(tiny, compose, random_prompts, padded, full):
    """The prompt goes in by chunks, repeated for the beams before `generate` does so itself."""
    inputs = padded(random_prompts(20, 11))
    for options in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}):
        wanted = full(inputs, **options, max_new_tokens=20)
        torch.manual_seed(1)
        got, cache = generate(tiny(), inputs, compose(budget=ROOMY, prefill_chunk=6), **options, max_new_tokens=20)
        assert torch.equal(got, wanted)
        assert len(cache.engine.rows) == 2 * max(options.values())


class _Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token(tiny, compose, random_prompts):
    streamer = _Collector()
    ids = torch.tensor(random_prompts(20))
    with PolicyCache(compose(), tiny()) as cache:
        output = tiny().generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache, streamer=streamer)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("policy", [{}, ACCUMULATED, {"phase": "both", "prefill_chunk": 5}, STREAMING])
def test_several_turns_on_one_cache(policy, tiny, compose, random_prompts):
    model, policy = tiny(), compose(**policy)
    first, second, third = random_prompts(20, 13, 40)
    with TracedCache(policy, model, outputs=True) as cache:
        text = torch.tensor([first])
        for more in (None, second, third):
            if more is not None:
                text = torch.cat([text, torch.tensor([more])], 1)
            cache.prefill_chunks(text)
            text = model.generate(text, do_sample=True, max_new_tokens=20, past_key_values=cache)
        cache.settled()
        assert cache.get_seq_length() == text.shape[1] - 1
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.output_error < 1e-4
    assert cache.engine.rows[0].prompt == 20


def test_several_turns_below_the_budget_equal_the_full_cache(tiny, compose, random_prompts):
    model = tiny()
    first, second = random_prompts(20, 13)
    texts = []
    with PolicyCache(compose(budget=ROOMY), model) as ours:
        for cache in (ours, DynamicCache(config=model.config)):
            text = model.generate(torch.tensor([first]), do_sample=False, max_new_tokens=20, past_key_values=cache)
            text = torch.cat([text, torch.tensor([second])], 1)
            texts.append(model.generate(text, do_sample=False, max_new_tokens=20, past_key_values=cache))
    assert torch.equal(*texts)


def test_a_prompt_longer_than_the_budget_in_chunks(tiny, compose, random_prompts, padded):
    """With chunks, no more than budget and chunk is ever held."""
    policy = compose(phase="both", prefill_chunk=10)
    inputs = padded(random_prompts(150, 90))
    with TracedCache(policy, tiny(), outputs=True) as cache:
        cache.prefill_chunks(inputs["input_ids"], inputs["attention_mask"])
        tiny().generate(**inputs, do_sample=False, max_new_tokens=20, past_key_values=cache)
        cache.settled()
        assert cache.stats().peak_resident <= policy.bound == 34
        assert cache.stats().layers[0].bytes_allocated <= 34 * 2 * 2 * 2 * 16 * 4
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.output_error < 1e-5


def test_two_threads_with_a_cache_each_on_one_model(tiny, compose, random_prompts):
    model = tiny()
    prompts = random_prompts(20, 31)
    policies = [compose(), compose(**ACCUMULATED, budget=20)]

    def run(n: int):
        with PolicyCache(policies[n], model) as cache:
            text = model.generate(torch.tensor([prompts[n]]), do_sample=False, max_new_tokens=60, past_key_values=cache)
            return text.tolist(), [cache.kept(layer, head) for layer in range(3) for head in range(2)]

    alone = [run(0), run(1)]
    found: dict[tuple[int, int], object] = {}

    def work(n: int) -> None:
        for repeat in range(3):
            try:
                found[n, repeat] = run(n)
            except Exception as error:  # noqa: BLE001
                found[n, repeat] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(n, repeat): alone[n] for n in (0, 1) for repeat in range(3)}
    assert model.config._attn_implementation == "sdpa"


def test_a_thread_with_a_full_cache_beside_one_with_a_policy(tiny, compose, random_prompts):
    model, ids = tiny(), torch.tensor(random_prompts(20))
    wanted = model.generate(ids, do_sample=False, max_new_tokens=60, past_key_values=DynamicCache(config=model.config))
    texts = []

    def work() -> None:
        for _ in range(3):
            cache = DynamicCache(config=model.config)
            texts.append(model.generate(ids, do_sample=False, max_new_tokens=60, past_key_values=cache))

    with PolicyCache(compose(), model) as cache:
        thread = threading.Thread(target=work)
        thread.start()
        model.generate(ids, do_sample=False, max_new_tokens=120, past_key_values=cache)
        thread.join()
    assert len(texts) == 3
    assert all(torch.equal(text, wanted) for text in texts)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_fork_goes_its_own_way(policy, tiny, compose, random_prompts, padded):
    """Continuations of one prompt from forks are those from caches that have read the prompt themselves."""
    model, policy = tiny(), compose(**policy)
    inputs = padded(random_prompts(35, 20))
    text = {}

    def sampled(cache, seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, do_sample=True, max_new_tokens=30, past_key_values=cache).tolist()

    with PolicyCache(policy, model) as cache:
        for seed in (1, 2):
            with PolicyCache(policy, model) as fresh:
                fresh.prefill(**inputs, chunk=17)
                text[seed] = sampled(fresh, seed)
        cache.prefill(**inputs, chunk=17)
        seen = cache.get_seq_length()
        with cache.fork() as one, cache.fork() as two:
            assert sampled(one, 1) == text[1]
            assert cache.get_seq_length() == seen
            assert sampled(two, 2) == text[2]
        assert sampled(cache, 1) == text[1]
    assert text[1] != text[2]


def test_a_fork_in_the_middle_of_decoding(tiny, compose, random_prompts):
    model = tiny("gemma3")
    with TracedCache(compose(), model) as cache:
        text = model.generate(
            torch.tensor(random_prompts(35)), do_sample=False, max_new_tokens=9, past_key_values=cache
        )
        with cache.fork() as twin:
            ends = [model.generate(text, do_sample=False, max_new_tokens=20, past_key_values=c) for c in (cache, twin)]
            assert torch.equal(*ends)
            assert twin.kept(1, 0) == cache.kept(1, 0)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_after_reset_a_cache_is_as_new(policy, family, tiny, compose, random_prompts, padded):
    model, results = tiny(family), []
    inputs = padded(random_prompts(20, 31))
    with PolicyCache(compose(**policy), model) as cache:
        for batch in (inputs, padded(random_prompts(45, seed=9)), inputs):
            torch.manual_seed(1)
            text = model.generate(**batch, do_sample=True, max_new_tokens=30, past_key_values=cache)
            kept = [cache.kept(layer, 0) for layer in cache.engine.layers]
            results.append((text.tolist(), kept, cache.stats().peak_resident))
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.stats().seen == 0
    assert results[0] == results[2]


@pytest.mark.parametrize("policy", [*POLICIES.values(), {"trigger": {"every": 3}}, {"phase": "both"}])
@pytest.mark.parametrize("sample", [False, True])
def test_prompt_lookup_with_evictions(policy, sample, tiny, compose):
    """Candidates are taken back when the model disagrees; what is kept is what the accepted text alone would keep."""
    policy = compose(**policy)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10] * 5 + [5, 6]])
    with TracedCache(policy, tiny(), outputs=True) as cache:
        text = tiny().generate(
            ids, do_sample=sample, max_new_tokens=60, past_key_values=cache, prompt_lookup_num_tokens=3,
            max_matching_ngram_size=1, eos_token_id=[300],
        )  # fmt: skip
        cache.settled()
        assert text.shape[1] == 92
    assert max(event.columns for event in cache.trace.events if isinstance(event, Crop)) == 3
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions > 0
    assert report.output_error < 1e-4


@pytest.mark.parametrize("length", [7, 40])
def test_prompt_lookup_and_a_prompt_in_chunks(length, tiny, compose):
    """Transformers feeds the whole text again; only a prompt that fits one chunk can be helped by candidates."""
    policy = compose(phase="both", prefill_chunk=16, protect={"sinks": 2, "recent": 8})
    ids = torch.tensor([([5, 6, 7, 8, 9, 10] * 7)[:length]])
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": [300]}
    with TracedCache(policy, tiny(), outputs=True) as cache:
        if length > 16:
            with pytest.raises(UnsupportedError, match="chunks"):
                generate(tiny(), {"input_ids": ids}, cache, do_sample=True, max_new_tokens=30, **lookup)
            return
        generate(tiny(), {"input_ids": ids}, cache, do_sample=True, max_new_tokens=50, **lookup)
        cache.settled()
        assert cache.stats().peak_resident <= policy.bound
    report = compare(cache.trace, policy)
    assert report.ok, report


@pytest.mark.parametrize("chunk", [1, 2])
def test_the_smallest_chunks_are_still_a_prompt(chunk, tiny, compose, random_prompts):
    """A prompt that comes token by token is not decoding."""
    ids = torch.tensor(random_prompts(30))
    policy = compose(phase="both", prefill_chunk=chunk)
    with TracedCache(policy, tiny(), outputs=True) as cache:
        generate(tiny(), {"input_ids": ids}, cache, do_sample=False, max_new_tokens=10)
        assert cache.engine.rows[0].prompt == 30
    assert compare(cache.trace, policy).ok


def test_prompt_lookup_beside_layers_with_a_window(tiny, compose):
    """Transformers 5.2 cannot take tokens back from a full window, of its own cache neither."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10] * 5 + [5, 6]])
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": [300]}
    model = tiny("gemma3")
    try:
        native = DynamicCache(config=model.config)
        model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=native, **lookup)
    except ValueError:
        with (
            PolicyCache(compose(), model) as cache,
            pytest.raises(CacheStateError, match="keeps no more than"),
        ):
            model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache, **lookup)
        return
    with TracedCache(compose(), model, outputs=True) as cache:
        model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache, **lookup)
        cache.settled()
    report = compare(cache.trace, cache.policy)
    assert report.ok, report
    assert report.output_error < 1e-5


def test_prompt_lookup_below_the_budget_gives_the_greedy_text(tiny, compose, full):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10] * 5 + [5, 6]])
    wanted = full({"input_ids": ids}, do_sample=False, max_new_tokens=40)
    with PolicyCache(compose(budget=ROOMY), tiny()) as cache:
        got = tiny().generate(
            ids, do_sample=False, max_new_tokens=40, past_key_values=cache, prompt_lookup_num_tokens=3,
            max_matching_ngram_size=1, eos_token_id=[300],
        )  # fmt: skip
    assert torch.equal(got, wanted)


def test_an_assistant_model_with_evictions(tiny, compose, random_prompts):
    policy = compose(**ACCUMULATED)
    with TracedCache(policy, tiny(), outputs=True) as cache:
        tiny().generate(
            torch.tensor(random_prompts(30)), do_sample=False, max_new_tokens=40, past_key_values=cache,
            assistant_model=tiny("llama", num_hidden_layers=1), eos_token_id=[300],
        )  # fmt: skip
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions > 0


def test_finished_rows_go_on_as_padding_tokens(tiny, compose, random_prompts, padded):
    """`generate` feeds finished rows with padding that is not masked; they must not disturb the others."""
    model, inputs = tiny(), padded(random_prompts(20, 31))
    policy = compose()
    first = model.generate(
        **inputs, do_sample=False, max_new_tokens=6, past_key_values=DynamicCache(config=model.config)
    )
    with TracedCache(policy, model) as cache:
        model.generate(
            **inputs, do_sample=False, max_new_tokens=40, past_key_values=cache, eos_token_id=int(first[1, -1])
        )
        cache.settled()
    assert compare(cache.trace, policy).ok


def test_a_later_turn_may_hide_what_a_finished_row_wrote(tiny, compose, random_prompts, padded):
    model = tiny()
    inputs = padded(random_prompts(10, 7))
    more = torch.tensor(random_prompts(6, 6, seed=8))
    with PolicyCache(compose(budget=60), model) as cache, torch.no_grad():
        first = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**inputs, position_ids=first, past_key_values=cache)
        end = torch.tensor([[11, 12, 13], [14, 0, 0]])
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        model(end, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, 10:], past_key_values=cache)
        mask[1, 11:] = 0
        mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
        places = (mask.cumsum(1) - 1)[:, 13:]
        logits = model(more, attention_mask=mask, position_ids=places, past_key_values=cache).logits
        ids = torch.cat([inputs["input_ids"], end, more], 1)
        wanted = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 13:]
    assert torch.allclose(logits, wanted, atol=1e-4)
