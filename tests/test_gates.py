"""Gates in the formats that TRIM-KV and KVzap publish, and in tables."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.errors import TableError
from kvpolicy.tables import Table, gate_of, load_table, save_table

L, H, E, W = 3, 2, 10, 5
CPU = torch.device("cpu")


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def kvzap(mlp: bool) -> tuple[dict, list[nn.Module]]:
    """A KVzap file as `save_pretrained` writes it, and its modules."""
    torch.manual_seed(3)
    modules = [nn.Sequential(nn.Linear(E, W), nn.GELU(), nn.Linear(W, H)) if mlp else nn.Linear(E, H) for _ in range(L)]
    tensors = nn.ModuleDict({"layers": nn.ModuleList(modules)}).state_dict()
    return {name: each.clone() for name, each in tensors.items()}, modules


def trim_kv(maps: int, prefix="model.") -> dict[str, torch.Tensor]:
    """The gates of TRIM-KV (two linear maps) or DBTrimKV (three), by the names of their file."""
    torch.manual_seed(4)
    found = {}
    for i in range(L):
        at = f"{prefix}layers.{i}.self_attn.retention_gate."
        for number in range(1, maps):
            found[f"{at}linear{number}.weight"] = torch.randn(W, E if number == 1 else W)
            found[f"{at}linear{number}.bias"] = torch.randn(W)
        found[f"{at}linear{maps}.weight"] = torch.randn(H, W)
        found[f"{at}bias"] = torch.randn(H)
    return found


def _logits(table, layer, hidden):
    parts = table.of_layer(layer, HeadSpan.whole(H), E, CPU)
    return gate_of(parts, hidden, table.notes["activation"])


@pytest.mark.parametrize("mlp", [False, True])
def test_kvzap_is_read_as_it_is_published(tmp_path, mlp):
    tensors, modules = kvzap(mlp)
    folder = tmp_path / "KVzap-mlp-Some-Model"
    folder.mkdir()
    save_file({name: each.to(torch.bfloat16) for name, each in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "kvzap", "input_dim": E, "output_dim": H}))
    table = load_table(folder / "model.safetensors", "gates")
    assert (table.num_layers, table.num_kv_heads, table.head_dim, table.hidden_size) == (L, H, 0, E)
    assert (table.method, table.model, table.notes["output"]) == ("kvzap", "KVzap-mlp-Some-Model", "score")
    hidden = _random(2, 7, E)
    for i, module in enumerate(modules):
        with torch.no_grad():
            wanted = module.to(torch.bfloat16).float()(hidden).transpose(1, 2)
        assert torch.allclose(_logits(table, i, hidden), wanted, atol=1e-5)
    with pytest.raises(TableError, match="does not fit a model of 3, 2, 12"):
        table.check_model(L, H, 64, 12)
    table.check_model(L, H, 64, E)


@pytest.mark.parametrize("maps", [2, 3])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", ""])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_pytorch_tanh"])
def test_trim_kv_is_read_as_it_is_published(tmp_path, maps, prefix, activation):
    tensors = trim_kv(maps, prefix)
    save_file(tensors, tmp_path / "gates.safetensors")
    if activation is not None:
        config = {"hidden_act": activation, "base_model": "some/model", "retention_gate": "rg" if maps == 2 else "rg10"}
        (tmp_path / "config.json").write_text(json.dumps(config))
    table = load_table(tmp_path / "gates.safetensors", "gates")
    assert (table.num_layers, table.num_kv_heads, table.hidden_size, table.method) == (L, H, E, "trim-kv")
    assert table.notes["output"] == "retention"
    if activation is not None:
        assert table.model == "some/model"
    act = nn.GELU(approximate="tanh") if activation == "gelu_pytorch_tanh" else nn.SiLU()
    hidden = _random(1, 4, E)
    for i in range(L):
        at, x = f"{prefix}layers.{i}.self_attn.retention_gate.", hidden
        for number in range(1, maps):
            x = act(x @ tensors[f"{at}linear{number}.weight"].T + tensors[f"{at}linear{number}.bias"])
        wanted = (x @ tensors[f"{at}linear{maps}.weight"].T + tensors[f"{at}bias"]).transpose(1, 2)
        assert torch.allclose(_logits(table, i, hidden), wanted, atol=1e-5)


def _without(tensors, *words):
    return {name: each for name, each in tensors.items() if not any(word in name for word in words)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (_without(kvzap(False)[0], "layers.1."), None, "has no gate for layer 1, and one for layer 2"),
        (_without(kvzap(True)[0], "layers.2.0.bias"), None, "its gates are not alike in all layers"),
        (_without(kvzap(False)[0], "bias"), None, "its gates are not alike in all layers"),
        ({**kvzap(False)[0], "layers.1.weight": torch.zeros(H, E + 1)}, None, "its gates are not alike in all layers"),
        (trim_kv(2), {"retention_gate": "rg2"}, r"another form \('rg2'\)"),
        ({"model.layers.0.self_attn.retention_gate.gate_proj.weight": torch.zeros(2, 2)}, None, "another form"),
        (trim_kv(2), {"hidden_act": "tanh"}, "should say `activation`, one of gelu"),
        (trim_kv(2), "{", "config.json beside it is not JSON"),
        ({**kvzap(False)[0], "layers.1.weight": torch.full((H, E), float("nan"))}, None, "holds NaN or infinity"),
        ({"layers.0.weight": torch.zeros(H, E), "layers.0.bias": torch.zeros(H)}, None, "is uniform"),
        ({"something.else": torch.zeros(2)}, None, "is not a table of kvpolicy"),
    ],
)
def test_what_is_no_gate_is_refused_in_a_sentence(tmp_path, tensors, config, message):
    save_file(tensors, tmp_path / "it.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(TableError, match=message) as caught:
        load_table(tmp_path / "it.safetensors", "gates")
    assert "it.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_gates_comes_back_and_one_that_says_too_little_is_refused(tmp_path):
    tensors = {"output_weight": _random(L, H, E), "output_bias": _random(L, H)}
    made = Table("gates", "m", "kvzap", L, H, 16, tensors, notes={"output": "score"})
    save_table(made, tmp_path / "it.safetensors", torch.bfloat16)
    back = load_table(tmp_path / "it.safetensors", "gates")
    assert torch.allclose(back.tensors["output_weight"], tensors["output_weight"], atol=2e-2)
    assert back.notes["output"] == "score"
    for notes, more, message in (
        ({}, {}, "should say `output`"),
        ({"output": "score"}, {"hidden0_weight": _random(L, E, E)}, "one of hidden0_weight and hidden0_bias"),
        (
            {"output": "score"},
            {"hidden0_weight": _random(L, E, E), "hidden0_bias": _random(L, E)},
            "should say `activation`",
        ),
        (
            {"output": "score", "activation": "relu"},
            {"hidden1_weight": _random(L, E, E), "hidden1_bias": _random(L, E)},
            "a second hidden map and no first one",
        ),
        ({"output": "score"}, {"hidden0_weight": _random(L, W, E), "hidden0_bias": _random(L, W)}, "with W = 10"),
    ):
        with pytest.raises(TableError, match=message):
            Table("gates", "m", "kvzap", L, H, 16, {**tensors, **more}, notes=notes)


def test_a_rank_gets_the_rows_of_its_heads():
    tensors = {"output_weight": _random(L, 4, E), "output_bias": _random(L, 4)}
    table = Table("gates", "m", "kvzap", L, 4, 16, tensors, notes={"output": "score"})
    hidden, every = _random(1, 3, E), []
    for first in (0, 2):
        parts = table.of_layer(1, HeadSpan(first, 2, 4), E, CPU)
        every.append(gate_of(parts, hidden, ""))
    whole = gate_of(table.of_layer(1, HeadSpan.whole(4), E, CPU), hidden, "")
    assert torch.allclose(torch.cat(every, 1), whole)
    with pytest.raises(TableError, match="does not fit"):
        table.of_layer(1, HeadSpan(0, 2, 2), E, CPU)


def test_pieces_of_a_long_text_are_put_together(monkeypatch):
    monkeypatch.setattr("kvpolicy.tables.gates._TOKENS", 4)
    layer = {"output_weight": _random(H, E), "output_bias": _random(H)}
    hidden = _random(2, 11, E)
    wanted = torch.einsum("he,bqe->bhq", layer["output_weight"], hidden) + layer["output_bias"][None, :, None]
    assert torch.allclose(gate_of(layer, hidden, ""), wanted, atol=1e-5)


@pytest.mark.parametrize("number", ["9" * 12, "9" * 5_000])
def test_a_layer_that_no_model_has_takes_neither_memory_nor_time(tmp_path, number):
    tensors, _ = kvzap(mlp=False)
    tensors[f"layers.{number}.weight"] = torch.zeros(H, E)
    save_file(tensors, tmp_path / "gates.safetensors")
    with pytest.raises(TableError, match="is not a table of kvpolicy"):
        load_table(tmp_path / "gates.safetensors", "gates")
