"""The kernels in Triton's interpreter, in a process of its own: ``make test-kernels``.

Triton decides at its import whether it interprets, and transformers imports it, so these tests cannot share a process
with the others. Without TRITON_INTERPRET=1 they are marked `gpu` and run natively on a CUDA or HIP device.
"""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents:
            continue
        if not INTERPRETING:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or HIP device, or make test-kernels"))


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture
def seed():
    """A fresh seed for each test, printed when it fails; KVPOLICY_SEED repeats one."""
    number = int(os.environ.get("KVPOLICY_SEED") or secrets.randbelow(2**31))
    print(f"KVPOLICY_SEED={number}")
    random.seed(number)
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill what the launchers allocate with NaN and with large integers: a slot that is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(tensor):
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))


@pytest.fixture(params=["forward", "backward"])
def grid_order(request, monkeypatch):
    """Run the programs of every grid in either order; the interpreter knows no other form of a race."""
    if request.param == "forward":
        return
    if not INTERPRETING:
        pytest.skip("a device chooses the order itself")
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda *at: forward(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))
    )
