"""Gates that are trained here: what they are fitted to, and that the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.calibration import gates
from kvpolicy.runtimes.hf.calibration.watching import watch
from kvpolicy.tables import gate_of


@pytest.fixture
def chunks():
    g = torch.Generator().manual_seed(2)
    return [torch.randint(3, 256, (90,), generator=g) for _ in range(3)]


def _targets(model, tokens, count):
    """The later attention to each token, query by query, with eager attention's weights; `[L][H, count]`."""
    with torch.no_grad():
        made = model(tokens[None], output_attentions=True, output_hidden_states=True)
    found = []
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad():
            states = layer.input_layernorm(made.hidden_states[i])[0].double()
            heads, size = model.config.num_key_value_heads, model.config.head_dim
            values = layer.self_attn.v_proj(states.float()).unflatten(-1, (heads, size))[0:].double()
        groups = model.config.num_attention_heads // heads
        after = layer.self_attn.o_proj.weight.detach().double()
        table = torch.zeros(heads, count, dtype=torch.float64)
        for query_head in range(heads * groups):
            part = after[:, query_head * size : (query_head + 1) * size]
            for n in range(count):
                written = (part @ values[n, query_head // groups]).norm()
                for q in range(n + gates.NEAR, len(tokens)):
                    weight = float(made.attentions[i][0, query_head, q, n]) * written / states[q].norm()
                    table[query_head // groups, n] = max(table[query_head // groups, n], float(weight))
        found.append(table.log())
    return found


def test_a_score_gate_is_the_ridge_regression_of_the_largest_later_attention(tiny, chunks):
    model, horizon = tiny("llama", attention="eager"), 40
    made = gates.score_gates(model, chunks, horizon)
    inputs: dict[int, list[torch.Tensor]] = {}
    targets: dict[int, list[torch.Tensor]] = {}
    for chunk in chunks:
        for layer, wanted in enumerate(_targets(model, chunk, len(chunk) - horizon)):
            targets.setdefault(layer, []).append(wanted)
        watch(model, chunk, lambda seen: inputs.setdefault(seen.layer, []).append(seen.hidden_states()[:-horizon]))
    for layer in range(3):
        x, y = torch.cat(inputs[layer]).double(), torch.cat(targets[layer], 1).T
        centred = x - x.mean(0)
        square = centred.T @ centred + gates.RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(square, centred.T @ (y - y.mean(0))).T
        assert torch.allclose(made["output_weight"][layer].double(), weight, atol=1e-3)
        assert torch.allclose(made["output_bias"][layer].double(), y.mean(0) - weight @ x.mean(0), atol=1e-3)


def test_retention_gates_make_a_forgetting_model_write_more_alike(tiny, chunks, monkeypatch):
    monkeypatch.setattr(gates, "CAPACITY", 12)
    monkeypatch.setattr(gates, "_EPOCHS", 4)
    monkeypatch.setattr(gates, "_RATE", 2e-2)
    model, left = tiny("llama"), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    tensors = gates.retention_gates(model, chunks, 0, left.append)
    assert left[-1] == 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])

    def loss(held):
        trained = gates._Gates(model, 3, torch.Generator().manual_seed(0))
        trained.load_state_dict(held)
        total = 0.0
        with torch.no_grad():
            for chunk in chunks:
                wanted = gates._next_tokens(model, chunk, None)[0]
                made, above = gates._next_tokens(model, chunk, trained)
                total += float(functional.kl_div(made, wanted, reduction="batchmean", log_target=True) + above)
        return total

    first = gates._Gates(model, 3, torch.Generator().manual_seed(0)).state_dict()
    assert loss(tensors) < 0.9 * loss(first)
    again = gates.retention_gates(model, chunks, 0, left.append)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_student_that_forgets_nothing_is_the_model(tiny, chunks):
    model = tiny("qwen3")
    all_of_it = gates._Gates(model, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        all_of_it.output_bias.fill_(300.0)
        wanted = gates._next_tokens(model, chunks[0], None)[0]
        made, above = gates._next_tokens(model, chunks[0], all_of_it)
    assert torch.allclose(made, wanted, atol=1e-3)
    assert float(above) == pytest.approx(sum(max(n - gates.CAPACITY, 0) for n in range(1, 91)) / 90 / gates.CAPACITY)


def test_what_is_left_of_a_token_is_a_power(tiny):
    model = tiny("llama")
    made = gates._Gates(model, 3, torch.Generator().manual_seed(1))
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        retained = made.retained(1, states).exp()
        parts = {name: tensor[1] for name, tensor in made.tensors().items()}
        beta = torch.sigmoid(gate_of(parts, states[None], "silu")[0])
    for t in range(5):
        for i in range(t + 1):
            assert torch.allclose(retained[:, t, i], beta[:, i] ** (t - i), atol=1e-5)


def test_a_model_that_caps_its_logits_is_refused(tiny, chunks):
    model = tiny("gemma2", attention="eager")
    with pytest.raises(UnsupportedError, match="retention gates cannot be trained here"):
        gates.retention_gates(model, chunks, 0, int)
    assert all(p.requires_grad for p in model.parameters())
