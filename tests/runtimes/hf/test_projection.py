"""The output projection is what the layer computes, whatever its parameter holds."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import kvpolicy
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.projection import output_projection
from kvpolicy.testing.tiny import tiny_model

POLICIES = ("snapkv-prefill", "criticalkv")


@pytest.fixture
def kept(random_prompts):
    """Return what each head of the tiny Llama keeps of a prompt."""
    ids = torch.tensor(random_prompts(80))

    def run(model, name):
        with PolicyCache(kvpolicy.load(name, budget=64), model) as cache:
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
            return [cache.kept(layer, head) for layer in range(3) for head in range(2)]

    return run


class Adapted(nn.Module):
    """A projection with a low-rank adapter, as LoRA has it: the base's weight says nothing of it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.5)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.3)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


class Eightbit(nn.Module):
    """A projection whose parameter holds raw integers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features = base.in_features
        self.scale = base.weight.abs().amax(1) / 127
        self.weight = nn.Parameter((base.weight / self.scale[:, None]).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None])


def replaced(model, make):
    for layer in model.model.layers:
        layer.self_attn.o_proj = make(layer.self_attn.o_proj)
    return model.eval()


def adapted(model):
    return replaced(model, Adapted)


def merged(model):
    def merge(layer):
        plain = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False)
        plain.weight.data = layer.base.weight.data + layer.up.weight.data @ layer.down.weight.data
        return plain

    return replaced(copy.deepcopy(model), merge)


def dequantised(model):
    def plain(layer):
        made = nn.Linear(layer.in_features, len(layer.scale), bias=False)
        made.weight.data = layer.weight.data.float() * layer.scale[:, None]
        return made

    return replaced(copy.deepcopy(model), plain)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_adapters_count(name, kept):
    torch.manual_seed(1)
    model = adapted(tiny_model("llama"))
    assert kept(model, name) == kept(merged(model), name)


@torch.no_grad()
def test_adapters_make_a_difference(kept):
    """Or the test above would hold of a projection that ignores them."""
    torch.manual_seed(1)
    assert kept(adapted(tiny_model("llama")), "criticalkv") != kept(tiny_model("llama"), "criticalkv")


@torch.no_grad()
def test_raw_integers_are_not_a_projection(kept):
    model = replaced(tiny_model("llama"), Eightbit)
    assert kept(model, "criticalkv") == kept(dequantised(model), "criticalkv")


# transformers 5.2 takes the place of an offloaded parameter for that of the model.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@torch.no_grad()
def test_weights_that_are_loaded_on_the_way(kept):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.layers[0].self_attn.o_proj.weight.device.type == "meta"
    for name in POLICIES:
        assert kept(model, name) == kept(tiny_model("llama"), name)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_of_peft(kept):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["o_proj"], lora_dropout=0.1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    whole = copy.deepcopy(model).merge_and_unload()
    assert kept(model.eval(), "criticalkv") == kept(whole.eval(), "criticalkv")
    with model.disable_adapter():
        assert kept(model, "criticalkv") == kept(tiny_model("llama"), "criticalkv")


# -- the matrix itself ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two KV heads with three query heads of size 4 each, projected to 10."""

    def __init__(self, layer: nn.Module, name: str = "o_proj") -> None:
        super().__init__()
        setattr(self, name, layer)


def matrix(layer, name="o_proj", dtype=torch.float32):
    return output_projection(Attention(layer, name), 2, 3, torch.zeros(1, 2, 7, 4, dtype=dtype))


@torch.no_grad()
def test_a_plain_layer_is_read():
    layer = nn.Linear(24, 10)
    found = matrix(layer)
    assert found.shape == (2, 3, 4, 10)
    assert torch.equal(found, layer.weight.T.unflatten(0, (2, 3, 4)))
    assert found.data_ptr() == layer.weight.data_ptr()
    conv = transformers.pytorch_utils.Conv1D(10, 24)  # GPT-2's, whose weight lies the other way round
    assert torch.equal(matrix(conv, "c_proj"), conv.weight.unflatten(0, (2, 3, 4)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_asked_is_without_bias_and_dropout(dtype):
    layer = Adapted(nn.Linear(24, 10)).to(dtype).train()
    found = matrix(layer, dtype=dtype).float()
    expected = (layer.base.weight.float() + layer.up.weight.float() @ layer.down.weight.float()).T
    torch.testing.assert_close(found.flatten(0, 2), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    assert layer.training
    assert layer.dropout.training


@torch.no_grad()
def test_a_weight_that_changes_is_read_as_it_is_then():
    layer = Adapted(nn.Linear(24, 10))
    before = matrix(layer)
    layer.up.weight.zero_()
    assert not torch.equal(before, matrix(layer))
    torch.testing.assert_close(matrix(layer).flatten(0, 2), layer.base.weight.T)


@torch.no_grad()
def test_parametrised_and_hooked_layers_are_asked():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(24, 10))
    layer.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(matrix(layer).flatten(0, 2), layer.weight.T)
    hooked = nn.Linear(24, 10)
    hooked.register_forward_hook(lambda _module, _args, output: output * 3)
    torch.testing.assert_close(matrix(hooked).flatten(0, 2), 3 * hooked.weight.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_wide_layers_are_asked_in_parts(monkeypatch):
    monkeypatch.setattr("kvpolicy.runtimes.hf.projection._ROWS", 7)
    layer = Adapted(nn.Linear(24, 10)).eval()
    expected = layer.base.weight + layer.up.weight @ layer.down.weight
    torch.testing.assert_close(matrix(layer).flatten(0, 2), expected.T, atol=1e-6, rtol=0)


class Broken(nn.Module):
    def forward(self, _x):
        raise RuntimeError("no kernel for this device")


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Sequential(nn.Linear(24, 10), nn.GELU()), r"Attention\.o_proj, a Sequential, is no linear map"),
        (Broken(), r"Attention\.o_proj, a Broken, cannot be asked what it computes \(RuntimeError\)"),
        (nn.Linear(23, 10), "Attention has no output projection of width 24"),
        (nn.Linear(24, 10, device="meta"), r"Attention\.o_proj, a Linear, cannot be asked"),
    ],
)
def test_what_cannot_be_asked_is_refused(layer, message):
    with pytest.raises(UnsupportedError, match=message):
        matrix(layer)


def test_heads_that_are_normalised_together_are_refused():
    module = Attention(nn.Linear(24, 10))
    module.attn_sub_norm = nn.LayerNorm(24)
    with pytest.raises(UnsupportedError, match="normalises its heads together"):
        output_projection(module, 2, 3, torch.zeros(1, 2, 7, 4))
