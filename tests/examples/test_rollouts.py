"""GRPO with a policy in the generate step: the whole cache samples what is trained, a policy does not."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed; pip install 'kvpolicy[trl]'")

pytestmark = pytest.mark.filterwarnings("default")  # a third party's


def test_the_gap_is_zero_with_the_whole_cache_and_corrected_with_a_policy(example):
    script = example("rollouts")
    whole = script.main(["--policy", "full", "--steps", "2", "--tokens", "80"])
    assert len(whole) == 2
    assert max(whole) < 1e-3
    evicted = script.main(["--policy", "rkv", "--budget", "32", "--steps", "2", "--tokens", "80"])
    assert min(evicted) > 10 * max(whole)
