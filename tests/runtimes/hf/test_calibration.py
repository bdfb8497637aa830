"""Calibrations against dense references from transformers' own attention weights and projections."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

import kvpolicy
from kvpolicy import KVPolicyError, UnsupportedError
from kvpolicy.cli import main
from kvpolicy.cli.app import app
from kvpolicy.runtimes.hf.calibration import METHODS, Settings, calibrate
from kvpolicy.runtimes.hf.calibration.curves import FRACTIONS, OBSERVE, best_splits, loss_curves
from kvpolicy.runtimes.hf.calibration.probes import CUE, NEEDLE, copy_probes, copying, streaming_loss
from kvpolicy.runtimes.hf.calibration.statistics import query_filters, query_frequencies
from kvpolicy.tables import KINDS, OPTIONAL, load_table
from kvpolicy.testing.tiny import tiny_folder

L, H, G, D = 3, 2, 2, 16


@pytest.fixture
def model(tiny):
    return tiny("llama", attention="eager")


@pytest.fixture
def tokens():
    return torch.randint(4, 256, (400,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def dense(model, tokens):
    """Return attention weights `[L, H, G, N, N]` and values `[L, H, N, Dv]` as transformers computes them."""
    cache = DynamicCache(config=model.config)
    output = model(tokens[None], past_key_values=cache, output_attentions=True)
    weights = torch.stack([a[0].unflatten(0, (H, G)) for a in output.attentions]).double()
    return weights, torch.stack([layer.values[0] for layer in cache.layers]).double()


@torch.no_grad()
def projected(model, tokens):
    """Return un-rotated queries `[L, H, G, N, D]` from the layers' own projections."""
    inputs = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: inputs.append(out[0]))
        for layer in model.model.layers
    ]
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([q.unflatten(-1, (H, G, D)).movedim(0, 2) for q in inputs]).double()


@torch.no_grad()
def rotated(model, plain):
    """Rotate queries `[L, H, G, N, D]` as the model does."""
    flat = plain.flatten(1, 2).float()
    cos, sin = model.model.rotary_emb(flat, torch.arange(flat.shape[2])[None])
    return apply_rotary_pos_emb(flat, flat, cos, sin)[0].unflatten(1, (H, G)).double()


def test_a_probe_asks_for_what_stood_before(tokens):
    prefix = torch.tensor([1])
    probes = list(copy_probes(tokens, prefix, 200, 5, seed=0))
    assert len(probes) == 5
    for probe in probes:
        assert len(probe.tokens) == 200
        assert probe.tokens[0] == 1
        assert len(probe.reading) == len(probe.source) == NEEDLE - CUE
        # what comes next in the second copy stands at the source in the first one
        assert torch.equal(probe.tokens[probe.reading + 1], probe.tokens[probe.source])
        assert torch.equal(probe.tokens[probe.reading], probe.tokens[probe.source - 1])
        assert (probe.reading - probe.source > NEEDLE - 2).all()
        assert probe.tokens[-NEEDLE:].unique().numel() == NEEDLE
    assert len({int(probe.source[0]) for probe in probes}) == 5
    again = list(copy_probes(tokens, prefix, 200, 5, seed=0))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(probes, again, strict=True))
    other = next(copy_probes(tokens, prefix, 200, 5, seed=1))
    assert not torch.equal(other.tokens, probes[0].tokens)


def test_copying_is_the_attention_to_the_token_that_is_copied(model, tokens):
    probe = list(copy_probes(tokens, tokens[:0], 160, 3, seed=0))[1]
    weights, _ = dense(model, probe.tokens)
    expected = torch.stack([weights[..., q, s] for q, s in zip(probe.reading, probe.source, strict=True)]).mean((0, 3))
    assert torch.allclose(copying(model, probe).double(), expected, atol=1e-6)


def test_streaming_loss_is_what_the_output_loses(model, tokens):
    probe = list(copy_probes(tokens, tokens[:0], 160, 3, seed=0))[1]
    weights, values = dense(model, probe.tokens)
    expected = torch.zeros(L, H, dtype=torch.float64)
    for layer, head in itertools.product(range(L), range(H)):
        output = model.model.layers[layer].self_attn.o_proj.weight.detach().double()
        for q in probe.reading.tolist():
            near = [i for i in range(q + 1) if i < 4 or i > q - 20]
            whole = torch.zeros(output.shape[0], dtype=torch.float64)
            lost = torch.zeros_like(whole)
            for h, g in itertools.product(range(H), range(G)):
                w = weights[layer, h, g, q]
                columns = output[:, (h * G + g) * D : (h * G + g + 1) * D]
                whole += columns @ (w @ values[layer, h])
                if h == head:
                    kept = torch.zeros_like(w)
                    kept[near] = w[near] / w[near].sum()
                    lost += columns @ ((w - kept) @ values[layer, h])
            expected[layer, head] += lost.norm() / whole.norm() / len(probe.reading)
    assert torch.allclose(streaming_loss(model, probe, 4, 20).double(), expected, atol=1e-5)


def test_a_head_that_sees_all_it_needs_loses_nothing(model, tokens):
    probe = next(copy_probes(tokens, tokens[:0], 160, 3, seed=0))
    assert streaming_loss(model, probe, 4, 160).abs().max() < 1e-6


def test_filters_are_the_first_singular_vectors_of_the_rotated_queries(model, tokens):
    chunks = list(tokens.split(100))
    filters = query_filters(model, chunks)["filters"]
    queries = torch.cat([rotated(model, projected(model, chunk))[..., 4:, :] for chunk in chunks], dim=3)
    for layer, head in itertools.product(range(L), range(H)):
        directions = []
        for group in range(G):
            matrix = queries[layer, head, group]
            first = torch.linalg.svd(matrix, full_matrices=False).Vh[0]
            directions.append(first * torch.sign((matrix @ first).sum()))
        mean = torch.stack(directions).mean(0)
        assert torch.allclose(filters[layer, head].double(), mean / mean.norm(), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_frequencies_are_the_statistics_of_the_unrotated_queries(tiny, family, tokens):
    model = tiny(family)
    chunks = list(tokens.split(100))
    found = query_frequencies(model, chunks)
    plain = torch.cat([projected(model, chunk)[..., 4:, :] for chunk in chunks], dim=3)
    half = found["magnitude"].shape[-1]
    if family == "glm4":  # half of the dimensions, neighbours
        assert half == D // 4
        pairs = torch.complex(plain[..., 0 : 2 * half : 2], plain[..., 1 : 2 * half : 2])
    else:
        assert half == D // 2
        pairs = torch.complex(plain[..., :half], plain[..., half:])
    assert torch.allclose(torch.view_as_complex(found["mean"].double()), pairs.mean(3), atol=1e-5)
    assert torch.allclose(found["magnitude"].double(), pairs.abs().mean(3), atol=1e-5)


def test_a_loss_is_the_later_attention_to_what_was_dropped(model, tokens):
    chunks, horizon = list(tokens.split(200)), 50
    found = loss_curves(model, chunks, horizon)
    expected = torch.zeros(L, H, 101, dtype=torch.float64)
    for chunk in chunks:
        weights, values = dense(model, chunk)
        for layer, head in itertools.product(range(L), range(H)):
            w, size = weights[layer, head], values[layer, head].norm(dim=-1)
            rank = w[:, 150 - OBSERVE : 150, :150].mean((0, 1)).argsort(descending=True)
            paid = (w[:, 150:].mean((0, 1)) * size) / (w[:, 150:].mean((0, 1)) * size).sum()
            for step in range(101):
                dropped = rank[round(150 * step / 100) :]
                expected[layer, head, step] += paid[dropped].sum() / len(chunks)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert (found.diff(dim=-1) <= 1e-6).all()


def test_a_split_is_the_best_there_is():
    steps = torch.linspace(0, 1, 101)
    curves = torch.stack([(1 - steps) ** 3, 0.4 * (1 - steps) ** 2, 0.9 * (1 - steps) ** 8]).unsqueeze(0)
    found = best_splits(curves)
    assert torch.allclose(found["kept"].mean((1, 2)), found["fractions"])
    for fraction, kept in zip(FRACTIONS, (found["kept"][:, 0] * 100).round().int().tolist(), strict=True):
        total = round(fraction * 300)
        assert sum(kept) == total
        loss = sum(float(curves[0, h, n]) for h, n in enumerate(kept))
        best = min(
            float(curves[0, 0, a] + curves[0, 1, b] + curves[0, 2, total - a - b])
            for a in range(2, 101)
            for b in range(2, 101)
            if 2 <= total - a - b <= 100
        )
        assert loss == pytest.approx(best, abs=1e-6)


def test_a_bumpy_curve_is_taken_as_convex():
    steps = torch.linspace(0, 1, 101)
    cliff = (steps < 0.5).float()
    gentle = 1 - steps
    kept = best_splits(torch.stack([cliff, 0.9 * gentle])[None])["kept"][:, 0]
    at = FRACTIONS.index(0.3)
    assert kept[at, 0] == pytest.approx(0.5)  # what lies before the cliff's edge is worth nothing by itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    letters = torch.randint(32, 127, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(map(chr, letters)))
    return file


@pytest.mark.parametrize("method", METHODS)
def test_the_command_makes_a_table_that_loads(folder, text, tmp_path, method):
    out = tmp_path / "it.safetensors"
    arguments = ["calibrate", method, "--model", str(folder), "--text", str(text), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--runs", "3", "--length", "300"])
    assert done.exit_code == 0, done.output
    table = load_table(out, METHODS[method].kind)
    assert (table.num_layers, table.num_kv_heads, table.head_dim) == (L, H, D)
    assert table.model == folder.name
    assert table.command == f"kvpolicy {' '.join(arguments[:-2])} --runs 3 --length 300 --seed 0 --out {out}"
    assert table.notes["runs"] == "3"
    assert set(KINDS[table.kind]) <= set(table.tensors) <= {*KINDS[table.kind], *OPTIONAL.get(table.kind, {})}
    again = tmp_path / "again.safetensors"
    CliRunner().invoke(app, [*arguments[:-1], str(again), "--runs", "3", "--length", "300"])
    for name, tensor in load_table(again, table.kind).tensors.items():
        assert torch.allclose(tensor, table.tensors[name], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["headk"], "there is no calibration 'headk'. Did you mean 'headkv'?"),
        (["headkv", "--length", "5000"], "--text: 1500 tokens, "),
        (["headkv", "--length", "100"], "at least one run of 256 tokens is needed"),
        (["headkv", "--out", "table.bin"], "--out: table.bin should end in .safetensors"),
        (["headkv", "--out", "nowhere/table.safetensors"], "its folder should exist"),
        (["headkv", "--text", "nothing.txt"], "--text: nothing.txt: there is no such file"),
    ],
)
def test_what_cannot_be_calibrated_is_said_in_a_sentence(folder, text, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", *change, "--model", str(folder)]
    arguments += [] if "--text" in change else ["--text", str(text)]
    arguments += [] if "--out" in change else ["--out", "it.safetensors"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_with_other_layers_is_refused(tiny, tokens):
    class Characters:
        bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) % 256 for c in text]}

    def too_early(*_, **__):
        pytest.fail("all of the text was made tokens for a model that cannot be calibrated")

    words = "".join(chr(int(t)) for t in tokens)
    with pytest.raises(UnsupportedError, match="layer 0 has no full attention"):
        calibrate("headkv", tiny("gemma3"), too_early, words, name="g", command="", settings=Settings(length=300))
    with pytest.raises(KVPolicyError, match="too few"):
        calibrate("headkv", tiny("llama"), Characters(), "aaa", name="g", command="")


def test_the_model_is_left_as_it_was(tiny, tokens):
    model = tiny("llama", attention="sdpa")
    before = model(tokens[None, :50]).logits
    query_filters(model, [tokens[:50]])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens[None, :50]).logits, before)


def test_soft_caps_and_sinks_take_part(tiny, tokens):
    probe = next(copy_probes(tokens, tokens[:0], 120, 1, seed=0))
    model = tiny("gemma2", attention="eager")
    weights, _ = dense(model, probe.tokens)
    expected = torch.stack([weights[..., q, s] for q, s in zip(probe.reading, probe.source, strict=True)]).mean((0, 3))
    assert torch.allclose(copying(model, probe).double(), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qfilter", "headkv"])
def test_the_shipped_tables_can_be_made_again(tmp_path, method, request):
    text = request.config.rootpath / "examples/calibration/text.txt"
    out = tmp_path / "it.safetensors"
    done = CliRunner().invoke(app, ["calibrate", method, "--text", str(text), "--out", str(out)])
    assert done.exit_code == 0, done.output
    kind = METHODS[method].kind
    shipped, made = load_table(f"smollm2-135m/{method}", kind), load_table(out, kind)
    assert shipped.notes["text_sha256"] == made.notes["text_sha256"]
    for name, tensor in made.tensors.items():
        assert torch.allclose(tensor, shipped.tensors[name], atol=2e-3)


def test_a_policy_with_a_shipped_table_is_refused_for_another_model(tiny):
    from kvpolicy.errors import TableError
    from kvpolicy.runtimes.hf import PolicyCache

    spec = kvpolicy.load("knorm").replace("importance", {"use": "q_filter", "table": "smollm2-135m/qfilter"})
    with pytest.raises(TableError, match=r"smollm2-135m-instruct \(layers, KV heads, head dim: 30, 3, 64\)"):
        PolicyCache(spec, tiny("llama"))
