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


POLICY = """\
schema_version: 1
policy: small
extends: rkv
budget: {tokens: 64}
trigger: {every: 64}
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "small.yaml"
    path.write_text(POLICY)
    return str(path)


def planned(capsys, policy, *options):
    given = ("plan", policy, "--model-config", REASONER, "--block-size", "32", "--json", *options)
    assert main(given) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def served(policy):
    """One request in all of a GiB, and eight in 17 blocks, with the policy and without."""
    drawn = random.Random(2)
    asked = [[drawn.randrange(5, 220) for _ in range(40)] for _ in range(8)]
    settings = {"policy": policy}
    place = locate(REASONER, user="a test")
    tight = {"num_gpu_blocks_override": 17, "max_model_len": 256}
    return run(
        job(place, asked[:1], 216, policy=settings, max_model_len=256), job(place, asked[:1], 216, max_model_len=256),
        job(place, asked, 216, policy=settings, **tight), job(place, asked, 216, **tight), timeout=3500,
    )  # fmt: skip


def test_the_pool_and_a_request_have_the_blocks_that_are_planned(served, policy, capsys):
    found = planned(capsys, policy, "--length", "256", "--prompt", "40", "--cache-memory", "1GiB")
    assert found["vllm"]["refused"] is None
    assert found["vllm"]["blocks"] == served[0]["blocks"] == served[1]["blocks"]
    assert found["vllm"]["policy_blocks"] == served[0]["peak"]
    assert found["vllm"]["full_blocks"] == served[1]["peak"]


def test_as_many_requests_run_at_once_as_planned(served, policy, capsys):
    row = planned(capsys, policy, "--cache-memory", "1GiB")["bytes_per_token"]
    memory = str(17 * 32 * row)
    found = planned(capsys, policy, "--length", "256", "--prompt", "40", "--cache-memory", memory)
    assert found["vllm"]["blocks"] == served[2]["blocks"] == 17
    assert found["vllm"]["rows"] == served[2]["running"]
    assert served[2]["preemptions"] == 0
    # Without the policy vLLM lets more in than there is room for at their longest, and gives some up.
    assert found["vllm"]["full_rows"] == 16 // 8 < served[3]["running"]
    assert served[3]["preemptions"] > 0
