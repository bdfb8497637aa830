"""Tensor parallelism: two processes with half of the heads each keep what one process keeps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import kvpolicy
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.parallel import parallel_heads
from kvpolicy.testing.tiny import tiny_model

POLICIES = ("rkv", "random", "tova", "adakv-snapkv")  # alone, by a head's number, one set, one budget

RUN = """
import json, os, sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache

folder, out, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
ranks = int(os.environ.get("WORLD_SIZE", "1"))
split = {"tp_plan": "auto"} if ranks > 1 else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **split).eval()
ids = torch.randint(3, 250, (2, 60), generator=torch.Generator().manual_seed(0))
found = {}
for name in names:
    spec = kvpolicy.load(name, budget=40)
    if spec.phase != "prefill":
        spec = spec.replace("trigger", {"every": 8})
    with PolicyCache(spec, model) as cache:
        text = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        kept = [[[cache.kept(i, h, row=r) for h in range(2 // ranks)] for i in range(3)] for r in range(2)]
        found[name] = {"text": text.tolist(), "kept": kept, "compactions": cache.stats().compactions}
with open(f"{out}-{os.environ.get('RANK', 'whole')}", "w") as file:
    json.dump(found, file)
"""


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_ranks_keep_what_one_process_keeps(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    arguments = [str(script), str(tmp_path / "model"), str(tmp_path / "out"), ",".join(POLICIES)]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for command in ([], [*launch, "--master_port", str(_port())]):
        done = subprocess.run(
            [sys.executable, "-P", *command, *arguments],
            check=False, env=quiet, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    whole, first, second = (json.loads((tmp_path / f"out-{name}").read_text()) for name in ("whole", "0", "1"))
    for name in POLICIES:
        assert whole[name]["compactions"]
        assert whole[name]["text"] == first[name]["text"] == second[name]["text"]
        both = [
            [[*mine, *others] for mine, others in zip(*rows, strict=True)]
            for rows in zip(first[name]["kept"], second[name]["kept"], strict=True)
        ]
        assert both == whole[name]["kept"], name


class _Mesh:
    mesh_dim_names = ("tp",)

    def __getitem__(self, name):
        return self

    def get_local_rank(self):
        return 1

    def get_group(self):
        return None


def test_heads_go_by_rank_or_are_refused():
    model = tiny_model("llama")
    assert parallel_heads(model, [0, 2])[1] == {}
    model._tp_size, model._device_mesh = 2, _Mesh()
    assert parallel_heads(model, [0, 2])[1] == {0: HeadSpan(1, 1, 2), 2: HeadSpan(1, 1, 2)}
    model._tp_size = 3
    with pytest.raises(UnsupportedError, match="the 2 KV heads of layer 0 cannot be split over 3 ranks"):
        parallel_heads(model, [0, 2])


def test_a_layer_that_is_not_split_as_said_is_refused():
    """A plan that leaves the attention whole on every rank."""
    model = tiny_model("llama")
    model._tp_size, model._device_mesh = 2, _Mesh()
    with PolicyCache(kvpolicy.load("knorm", budget=16), model) as cache, torch.no_grad():  # noqa: SIM117
        with pytest.raises(
            UnsupportedError, match="layer 0 was given 2 KV heads, and tensor parallelism leaves 1 of 2"
        ):
            model(torch.arange(3, 13)[None], past_key_values=cache)
