"""Small policies and small models for the tests of the transformers runtime."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

import kvpolicy
from kvpolicy import Policy, PolicySpec
from kvsupport.policies import small_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _tiny(family: str, attention: str | None, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    from kvpolicy.testing.tiny import tiny_model

    return tiny_model(family, attention=attention, **dict(changes))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Make a tiny model, or return the one made before; tests must leave it as they found it."""
    return lambda family="llama", attention=None, **changes: _tiny(family, attention, tuple(sorted(changes.items())))


@pytest.fixture(scope="session")
def compose() -> Callable[..., Policy]:
    """Make a policy out of file fields; R-KV with 24 entries and a buffer of 8 unless told otherwise."""

    def make(**fields: Any) -> Policy:
        base = {
            "policy": "test",
            "budget": 24,
            "trigger": {"every": 8},
            "protect": {"sinks": 2, "recent": 8},
            "importance": "window_attention",
            "redundancy": "key_cosine",
            "mixer": {"use": "linear", "weight": 0.1},
        }
        if "redundancy" not in fields and fields.get("mixer") == "importance_only":
            base["redundancy"] = "none"
        return PolicySpec(**{**base, **fields}).build()

    return make


@pytest.fixture(scope="session")
def small() -> Callable[..., Policy]:
    """Load a registered policy at a small budget, 24 entries and a buffer of 8 by default."""
    return small_policy


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `registered` with the name of every registered policy."""
    if "registered" in metafunc.fixturenames:
        metafunc.parametrize("registered", [entry.name for entry in kvpolicy.catalog().policies()])


@pytest.fixture(scope="session")
def random_prompts() -> Callable[..., list[list[int]]]:
    """Make prompts of the given lengths for the tiny models."""

    def make(*lengths: int, seed: int = 3) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 240, (n,), generator=generator).tolist() for n in lengths]

    return make


@pytest.fixture(scope="session")
def padded() -> Callable[[list[list[int]]], dict[str, torch.Tensor]]:
    """Turn prompts into the left-padded input of a model."""

    def make(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(len(prompt) for prompt in prompts)
        return {
            "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        }

    return make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer of one token per character for the tiny models."""
    from transformers import AutoTokenizer

    from kvpolicy.testing.tiny import tiny_folder

    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def chat(tokenizer):
    """Return the same tokenizer with a chat template."""
    from kvsupport.contexts import CHATML

    tokenizer.chat_template = CHATML
    yield tokenizer
    tokenizer.chat_template = None
