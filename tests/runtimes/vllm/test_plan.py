"""`kvpolicy plan` counts vLLM's blocks as vLLM does: of the pool, of a request, and of how many run at once."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest

from kvpolicy.cli import main
from kvpolicy.runtimes.opening import REASONER, locate
from kvsupport.vllm_engine import job, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(3600),
]


def planned(capsys, *options):
    given = ("plan", "rkv", "--model-config", REASONER, "--budget", "64", "--block-size", "32", "--json", *options)
    assert main(given) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def served():
    """One request in all of a GiB, and sixteen in 33 blocks, with the policy and without."""
    drawn = random.Random(2)
    asked = [[drawn.randrange(5, 220) for _ in range(40)] for _ in range(16)]
    policy = {"policy": "rkv", "budget": 64, "set": {"trigger": {"every": 128}}}
    place = locate(REASONER, user="a test")
    tight = {"num_gpu_blocks_override": 33, "max_model_len": 512}
    return run(
        job(place, asked[:1], 472, policy=policy, max_model_len=512), job(place, asked[:1], 472, max_model_len=512),
        job(place, asked, 472, policy=policy, **tight), job(place, asked, 472, **tight),
    )  # fmt: skip


def test_the_pool_and_a_request_have_the_blocks_that_are_planned(served, capsys):
    found = planned(capsys, "--length", "512", "--prompt", "40", "--cache-memory", "1GiB")
    assert found["vllm"]["refused"] is None
    assert found["vllm"]["blocks"] == served[0]["blocks"] == served[1]["blocks"]
    assert found["vllm"]["policy_blocks"] == served[0]["peak"]
    assert found["vllm"]["full_blocks"] == served[1]["peak"]


def test_as_many_requests_run_at_once_as_planned(served, capsys):
    row = planned(capsys, "--cache-memory", "1GiB")["bytes_per_token"]
    memory = str(33 * 32 * row)
    found = planned(capsys, "--length", "512", "--prompt", "40", "--cache-memory", memory)
    assert found["vllm"]["blocks"] == served[2]["blocks"] == 33
    assert found["vllm"]["rows"] == served[2]["running"]
    assert served[2]["preemptions"] == 0
    # Without the policy vLLM lets more in than there is room for at their longest, and gives some up.
    assert found["vllm"]["full_rows"] == 32 // 16 < served[3]["running"]
    assert served[3]["preemptions"] > 0
