"""What a real model must write on a GPU, in fp32 and in bf16: `pytest -m gpu`.

With KVPOLICY_DEVICE=cpu they run on the CPU, which shows that nothing breaks for the first time on a device.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache

DEVICE = os.environ.get("KVPOLICY_DEVICE", "cuda")
ON_CPU = DEVICE == "cpu"
TOKENS = 12 if ON_CPU else 48
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]
QUESTION = "Write a story about a fox who learns to count, and about its friend the owl, who already can."


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request, smollm2):
    return copy.deepcopy(smollm2[0]).to(DEVICE, request.param).eval()


@pytest.fixture(scope="module")
def prompt(smollm2):
    messages = [{"role": "user", "content": QUESTION}]
    text = smollm2[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([smollm2[1](text, add_special_tokens=False)["input_ids"]], device=DEVICE)


def small(name, backend="auto"):
    return kvpolicy.load(name, budget=32, backend=backend, trigger={"every": 16})


def decode(model, prompt, cache, text=None, call=None):
    """Decode a text, by default the one that is written greedily.

    Returns the likeliest token of each step, and how far it is ahead of the next, as a share of the largest logit.
    """
    tokens, gaps = [], []
    with torch.no_grad():
        logits = model(prompt, past_key_values=cache).logits[:, -1].float()
        for index in range(TOKENS):
            best = logits.topk(2).values[0]
            gaps.append(float((best[0] - best[1]) / logits.abs().max()))
            tokens.append(int(logits.argmax(-1)))
            step = torch.tensor([[tokens[-1] if text is None else text[index]]], device=prompt.device)
            logits = (call or model)(step, past_key_values=cache).logits[:, -1].float()
    return tokens, gaps


def check(got, wanted, gaps, dtype):
    """All tokens are the same, but where rounding decides between two that are as likely."""
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    others = [f"{i} (gap {gaps[i]:.1e})" for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b]
    clear = [i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b and gaps[i] > rounding]
    assert not clear, f"tokens {', '.join(others)} differ"


def test_below_the_budget_the_text_is_that_of_the_full_cache(model, prompt):
    wanted, gaps = decode(model, prompt, DynamicCache(config=model.config))
    with PolicyCache("rkv", model) as cache:
        got, _ = decode(model, prompt, cache, wanted)
        assert cache.stats().evicted == 0
    check(got, wanted, gaps, model.dtype)


@pytest.mark.parametrize("name", ["rkv", "rkv-density", "snapkv"])
def test_a_policy_writes_the_same_as_one_graph(name, model, prompt):
    with PolicyCache(small(name), model) as cache:
        wanted, gaps = decode(model, prompt, cache)
        assert cache.stats().evicted > 0
    with PolicyCache(small(name), model, graph=True) as cache:
        got, _ = decode(model, prompt, cache, wanted)
        assert cache.engine.steps
    check(got, wanted, gaps, model.dtype)


def test_a_captured_step_writes_what_the_step_writes(model, prompt):
    """Traced, captured as a CUDA graph and replayed with compactions in between; on a CPU traced."""
    if ON_CPU and model.dtype == torch.float32:
        pytest.skip("30 layers take long to trace, and a CPU captures nothing: once will do")
    with PolicyCache(small("rkv"), model, graph=True) as cache:
        wanted, gaps = decode(model, prompt, cache)
    torch.compiler.reset()
    with PolicyCache(small("rkv"), model, graph=True) as cache:
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
        got, _ = decode(model, prompt, cache, wanted, step if ON_CPU else Replayed(step, cache))
        assert cache.engine.rows[0].compactions > 0
    torch.compiler.reset()
    check(got, wanted, gaps, model.dtype)


class Replayed:
    """Captures the third step of a cache, and replays it for each one after."""

    def __init__(self, step, cache):
        self.step, self.cache, self.graph, self.calls = step, cache, None, 0

    def __call__(self, token, past_key_values):
        self.calls += 1
        if self.calls < 3:  # compiles, and sets up libraries, which cannot be captured
            return self.step(token, past_key_values=past_key_values)
        self.cache.begin_step()
        if self.graph is None:
            self.token, self.graph = token.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.step(self.token, past_key_values=past_key_values)
            self.graph.replay()  # what was captured has not run
            return self.output
        self.token.copy_(token)
        self.graph.replay()
        self.cache.end_step()
        return self.output


@pytest.mark.parametrize("name", ["rkv", "rkv-density", "snapkv"])
def test_kernels_keep_what_torch_keeps(name, model, prompt):
    """The same text is fed to both, so that a near tie in one cannot lead the other astray."""
    if ON_CPU or model.dtype == torch.float32:
        pytest.skip("kernels are for fp16 and bf16 on a device; in the interpreter tests/kernels compares them")
    text, _ = decode(model, prompt, DynamicCache(config=model.config))
    kept, rest = {}, torch.tensor([text], device=DEVICE)
    for backend in ("torch", "triton"):
        with torch.no_grad(), PolicyCache(small(name, backend), model) as cache:
            model(prompt, past_key_values=cache)
            for index in range(16):
                model(rest[:, index : index + 1], past_key_values=cache)
            layers, heads = range(model.config.num_hidden_layers), range(model.config.num_key_value_heads)
            assert cache.stats().evicted > 0
            kept[backend] = [cache.kept(layer, head) for layer in layers for head in heads]
    differ = sum(len(set(a) ^ set(b)) // 2 for a, b in zip(kept["torch"], kept["triton"], strict=True))
    assert differ <= 0.005 * sum(map(len, kept["torch"])), "more than near ties can explain"
