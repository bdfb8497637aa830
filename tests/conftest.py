"""For all tests. Helpers live in `kvsupport` (tests/support): in importlib mode tests cannot import each other."""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m pytest` puts the repository root on sys.path, where the bare folder kernels/ would pass for the PyPI
# package of that name and make transformers raise.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]

import os
import random
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
# Workers share the cores: with more threads, those of one tiny product wait for each other and burn a core each.
_SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(min(_SHARE, int(os.environ.get("OMP_NUM_THREADS", _SHARE))))

_QUIET = [hypothesis.HealthCheck.too_slow]  # shared machines are slow at times; pytest-timeout catches what hangs
hypothesis.settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=_QUIET)
hypothesis.settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, print_blob=True, suppress_health_check=_QUIET
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Begin every test with the same random numbers, whatever ran before it in its process."""
    random.seed(0)
    if "torch" in sys.modules:  # some tests do without
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer; converted on first use."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

    folder = ensure_demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)
