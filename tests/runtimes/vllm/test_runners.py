"""How both model runners hand over a batch; V2 by the fields in vLLM's sources (0.30 to 0.33), not run on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import kvpolicy
from kvpolicy.runtimes.vllm.worker import batch_order
from kvsupport import engine_loop
from kvsupport.engine_loop import EngineLoop, wishes


class RunnerV2:
    """`vllm.v1.worker.gpu.model_runner.GPUModelRunner`: a batch is made for each step and handed to `prepare_attn`."""

    def __init__(self, rows, tokens):
        self.block_tables = SimpleNamespace()
        self.slot_mappings = torch.full((1, tokens), -1, dtype=torch.int64)  # of all groups, used again at every step
        self.seq_lens = torch.zeros(rows, dtype=torch.int32)  # the same
        self.seen = []

    def prepare_attn(self, input_batch):
        self.seen.append(list(input_batch.req_ids))
        return (input_batch.block_table,), self.slot_mappings


def in_v2(runner, rows, checked):
    """What a builder of V2 is told: padded to `rows` requests and to all tokens, in buffers of the runner's own."""
    original = engine_loop.without_evicted

    def without_evicted(session, told, order):
        count, (real, width) = len(told.slot_mapping), told.block_table_tensor.shape
        table = torch.zeros(rows, width, dtype=torch.int64)
        table[:real] = told.block_table_tensor
        (table,), mappings = runner.prepare_attn(SimpleNamespace(req_ids=order, block_table=table))
        mappings.fill_(-1)
        mappings[0, :count] = told.slot_mapping
        runner.seq_lens.zero_()
        runner.seq_lens[:real] = told.seq_lens
        starts = torch.full((rows + 1,), count)
        starts[: real + 1] = told.query_start_loc_cpu
        before, kept_table = runner.seq_lens.clone(), table.clone()
        changed = original(session, engine_loop.Told(
            block_table_tensor=table, seq_lens=runner.seq_lens, seq_lens_cpu_upper_bound=runner.seq_lens.clone(),
            max_seq_len=int(before.max()), slot_mapping=mappings[0], query_start_loc_cpu=starts,
        ))  # fmt: skip
        assert torch.equal(runner.seq_lens, before)  # the next step counts on it
        assert torch.equal(table, kept_table)
        assert (mappings[0, count:] == -1).all()
        assert (changed.seq_lens[real:] == 0).all()
        assert torch.equal(changed.seq_lens, changed.seq_lens_cpu_upper_bound)
        checked.append(int(changed.max_seq_len) < int(before.max()))
        told.slot_mapping[:] = mappings[0, :count]
        return told.replace(block_table_tensor=changed.block_table_tensor[:real], seq_lens=changed.seq_lens[:real])

    return without_evicted


@pytest.mark.parametrize("policy", ["rkv", "sinks-recent"])
def test_v2_tells_the_requests_of_a_step_and_its_padding_stays(policy, monkeypatch):
    spec = kvpolicy.load(policy, budget=16, trigger={"every": 8})
    loop = EngineLoop(spec.build(), wishes(5, 3, longest=70), blocks=40, block=8, widest=24)
    runner, checked = RunnerV2(8, 64), []
    loop.session.order = batch_order(runner)
    told = in_v2(runner, 8, checked)
    monkeypatch.setattr(
        engine_loop, "without_evicted", lambda session, each: told(session, each, [w.name for w in loop.order])
    )
    loop.run()
    assert loop.compared > 50
    assert len(runner.seen) == loop.steps
    assert any(checked)


def test_the_batch_of_v2_is_none_before_its_first_step():
    assert batch_order(RunnerV2(2, 8))() == []


def test_v1_keeps_one_batch_and_its_order():
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    order = batch_order(runner)
    assert order() == ["b", "a"]
    runner.input_batch.req_ids = ["a"]
    assert order() == ["a"]
