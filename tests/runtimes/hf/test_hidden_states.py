"""Hidden states reach components once for every token, and nothing is left of them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from kvpolicy.errors import TableError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.runtimes.hf.handover import _read
from kvpolicy.runtimes.vllm.refusals import policy_refusal
from kvpolicy.tables import Table, gate_of, load_table, save_table
from kvpolicy.testing.tables import stand_in_tables
from kvpolicy.testing.tiny import FAMILIES
from kvsupport.alone import as_if_alone
from kvsupport.oracle import compare
from kvsupport.trace import TracedCache

L, H, D, E = 3, 2, 16, 64


def _table(path, output="score", hidden=0, **changes):
    g = torch.Generator().manual_seed(hidden + len(output))
    sizes = {"layers": L, "heads": H, "size": E, **changes}
    layers, heads, size = sizes["layers"], sizes["heads"], sizes["size"]
    last = 6 if hidden else size
    tensors = {"output_weight": torch.randn(layers, heads, last, generator=g) / last**0.5}
    tensors["output_bias"] = torch.randn(layers, heads, generator=g) + (3.0 if output == "retention" else 0.0)
    for number in range(hidden):
        fan = size if number == 0 else 6
        tensors[f"hidden{number}_weight"] = torch.randn(layers, 6, fan, generator=g) / fan**0.5
        tensors[f"hidden{number}_bias"] = torch.randn(layers, 6, generator=g)
    notes = {"output": output, "activation": "silu"}
    save_table(Table("gates", "tiny", "test", layers, heads, D, tensors, notes=notes), path)
    return str(path)


@pytest.fixture(params=[("score", 0), ("retention", 1), ("retention", 2)], ids=str)
def gate(request, tmp_path):
    return _table(tmp_path / "gate.safetensors", *request.param)


@pytest.fixture
def gated(compose, gate):
    def make(**fields):
        return compose(**{"importance": {"use": "learned_gate", "gate": gate}, "mixer": "importance_only", **fields})

    return make


@pytest.fixture
def prompts():
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 256, (n,), generator=g).tolist() for n in (37, 11, 20)]


def _said(model, tokens, gate):
    """What the gate says of each token, by the model's own list of hidden states and its norms; `[L][H, N]`."""
    table = load_table(gate, "gates")
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    found = []
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad():
            read = layer.input_layernorm(states[i])
        parts = {name: tensor[i] for name, tensor in table.tensors.items()}
        found.append(gate_of(parts, read, table.notes["activation"])[0])
    return found


def test_state_is_what_the_gate_says_of_the_layers_input(tiny, gated, gate, prompts):
    """In a padded batch, in chunks and in several turns, with nothing evicted."""
    model = tiny("llama")
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with PolicyCache(gated(budget=400), model) as cache, torch.no_grad():
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        model(ids[:, 30:], attention_mask=mask, past_key_values=cache)
        assert not hasattr(_read, "states") or _read.states is None
        for b, prompt in enumerate(prompts):
            wanted = _said(model, prompt, gate)
            for layer in range(L):
                view = cache.engine.view(layer, slice(b, b + 1))
                got = view.state["learned_gate"][0][view.valid[0]].view(H, -1)
                assert torch.allclose(got, wanted[layer], atol=2e-4)


def test_a_row_of_a_batch_behaves_as_if_alone(tiny, gated, prompts):
    report = as_if_alone(tiny("llama"), gated(phase="both"), prompts, 40)
    assert report.ok, report
    assert report.decisions > 3 * L * H


@pytest.mark.parametrize("phase", ["both", "decode"])
def test_the_oracle_agrees(tiny, gated, prompts, phase):
    model, policy = tiny("qwen3"), gated(phase=phase)
    with TracedCache(policy, model) as cache:
        generate(model, {"input_ids": torch.tensor([prompts[0]])}, cache, do_sample=False, max_new_tokens=40)
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions >= 4 * L * H


def test_rolled_back_tokens_leave_nothing(tiny, gated, prompts):
    model, tokens = tiny("llama"), torch.tensor([prompts[0]])
    with PolicyCache(gated(), model) as cache, torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        twin = cache.fork()
        model(torch.full((1, 3), 7), past_key_values=cache)
        cache.crop(-3)
        for each in (cache, twin):
            with each:
                model(tokens[:, 20:23], past_key_values=each)
        for layer in range(L):
            one, other = (each.engine.view(layer, slice(0, 1)).state["learned_gate"] for each in (cache, twin))
            assert torch.equal(one, other)


def test_beams_and_sampling_with_several_rows(tiny, gated, prompts):
    model = tiny("llama")
    inputs = {"input_ids": torch.tensor([prompts[0]])}
    wide, _ = generate(model, inputs, gated(budget=400), do_sample=False, num_beams=3, max_new_tokens=12)
    full = model.generate(
        **inputs, do_sample=False, num_beams=3, max_new_tokens=12, past_key_values=DynamicCache(config=model.config)
    )
    assert torch.equal(wide, full)
    narrow, cache = generate(model, inputs, gated(), do_sample=False, num_beams=3, max_new_tokens=30)
    assert narrow.shape[1] == len(prompts[0]) + 30
    assert cache.stats().evicted > 0


def test_assisted_decoding_writes_the_same_text(tiny, gated, prompts):
    model, inputs = tiny("llama"), {"input_ids": torch.tensor([prompts[0][:12]])}
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    plain, _ = generate(model, inputs, gated(budget=64), **options)
    helped, _ = generate(model, inputs, gated(budget=64), prompt_lookup_num_tokens=3, **options)
    assert torch.equal(plain, helped)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hands_its_hidden_states_over(tiny, compose, family):
    model = tiny(family)
    with stand_in_tables():
        policy = compose(importance={"use": "learned_gate", "gate": "stand-in/one"}, mixer="importance_only")
        ids = torch.arange(3, 53)[None]
        _, cache = generate(model, {"input_ids": ids}, policy, do_sample=False, max_new_tokens=10)
        assert cache.stats().evicted > 0
        for layer in cache.engine.layers:
            state = cache.engine.view(layer, slice(0, 1)).state["learned_gate"]
            assert bool((state != 0).all())


def test_half_precision_and_ragged_budgets(tiny, compose, gate, prompts):
    model = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    policy = compose(
        importance={"use": "learned_gate", "gate": gate}, mixer="importance_only", allocator="global_pool", phase="both"
    )
    ids = torch.tensor([prompts[0]])
    _, cache = generate(model, {"input_ids": ids}, policy, do_sample=False, max_new_tokens=30)
    assert cache.engine.view(0, slice(0, 1)).state["learned_gate"].dtype == torch.float32
    assert cache.stats().evicted > 0


def test_hooks_go_with_the_cache(tiny, gated, prompts):
    model = tiny("llama")
    ids = torch.tensor([prompts[0]])
    before = model(ids).logits
    attention = model.model.layers[0].self_attn
    hooks = len(attention._forward_pre_hooks), len(attention._forward_hooks)
    with PolicyCache(gated(), model) as cache:
        assert len(attention._forward_pre_hooks) == hooks[0] + 1
        with PolicyCache("rkv", model) as other, torch.no_grad():
            model(ids, past_key_values=other)  # hooks of the first run, and nobody takes what they leave
            assert len(attention._forward_pre_hooks) == hooks[0] + 1
        assert _read.states is None
        assert cache.get_seq_length() == 0
    assert (len(attention._forward_pre_hooks), len(attention._forward_hooks)) == hooks
    assert torch.equal(model(ids).logits, before)


def test_other_runtimes_refuse(tiny, gated):
    assert "trait hidden_states" in policy_refusal(gated())
    with pytest.raises(UnsupportedError, match="graph: policy 'test' needs hidden_states"):
        PolicyCache(gated(), tiny("llama"), graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 32}, r"KV heads, head dim, hidden size: 3, 2, 16, 32\) and does not fit a model of 3, 2, 16, 64"),
        ({"layers": 4}, "4, 2, 16, 64"),
        ({"heads": 4}, "3, 4, 16, 64"),
    ],
)
def test_a_gate_of_another_model_is_refused(tiny, compose, tmp_path, changes, message):
    gate = _table(tmp_path / "other.safetensors", **changes)
    policy = compose(importance={"use": "learned_gate", "gate": gate}, mixer="importance_only")
    with pytest.raises(TableError, match=message):
        PolicyCache(policy, tiny("llama"))


def test_an_attention_that_hides_what_it_reads_is_refused(tiny, gated, monkeypatch, prompts):
    monkeypatch.setattr("kvpolicy.runtimes.hf.hidden.hand_over", lambda module, states: None)
    model = tiny("llama")
    with (
        pytest.raises(UnsupportedError, match="not called with the hidden states"),
        PolicyCache(gated(), model) as cache,
        torch.no_grad(),
    ):
        model(torch.tensor([prompts[0]]), past_key_values=cache)
