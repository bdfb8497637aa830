"""Memory that nobody has written holds NaN inside the block, and only there."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.testing import poisoned_memory


def test_unwritten_memory_is_nan():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(2).new_empty(4).isnan().all()
        assert torch.empty_strided((2, 2), (2, 1)).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        assert torch.empty(2, dtype=torch.bool).all()
    assert torch.empty.__name__ == "empty"
    assert not hasattr(torch.empty, "__closure__") or torch.empty.__closure__ is None


def test_originals_come_back_after_an_exception():
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with pytest.raises(RuntimeError), poisoned_memory():
        torch.zeros(2).view(3)
    assert before == (torch.empty, torch.empty_like, torch.Tensor.new_empty)
