from __future__ import annotations

import random

import pytest
import torch

from kvpolicy.types import KeepIndices
from kvpolicy_kernels import compaction, selection

NAN = float("nan")


def case(device, n, *, ties=True):
    """Scores with ties and both zeros, masks with strides of their own, counts between protected and valid."""
    scores = torch.randn(2, 3, n)
    if ties:
        scores = (scores * 2).round() / 2
        scores[torch.rand(2, 3, n) < 0.3] = -0.0
    valid = (torch.rand(2, 3, n + 1) > 0.2)[..., 1:]
    protected = torch.rand(n, 3, 2).permute(2, 1, 0) > 0.9
    scores[~valid] = NAN
    least, most = (protected & valid).sum(-1), valid.sum(-1)
    counts = (least + (torch.rand(2, 3) * (most - least + 1)).long()).clamp(max=most)
    return [t.to(device) for t in (scores, counts, protected, valid)]


def expected(scores, counts, protected, valid, width):
    rows = []
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            slots = [s for s in range(scores.shape[2]) if valid[b, h, s]]
            slots.sort(key=lambda s: (not protected[b, h, s], -float(scores[b, h, s]), s))
            kept = sorted(slots[: int(counts[b, h])])
            rows.append(kept + [kept[-1] if kept else 0] * (width - len(kept)))
    return torch.tensor(rows, dtype=torch.int64).view(*scores.shape[:2], width)


@pytest.mark.usefixtures("seed", "grid_order")
@pytest.mark.parametrize("n", [1, 2, 31, 255, 256, 257, 700])
@pytest.mark.parametrize("ties", [True, False])
def test_equals_sorting(n, ties, device):
    scores, counts, protected, valid = case(device, n, ties=ties)
    width = int(counts.max()) + random.randint(0, 3)
    kept = selection.top_k(scores, counts, protected, valid, width=width)
    assert torch.equal(kept.indices.cpu(), expected(scores.cpu(), counts, protected, valid, width))
    assert kept.lengths is counts
    read = selection.top_k(scores, counts, protected, valid)
    assert torch.equal(read.indices, kept.indices[..., : int(counts.max())])


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("n", [selection.RESIDENT, selection.RESIDENT + 1, selection.RESIDENT + 1500])
def test_rows_longer_than_the_registers(n, device):
    scores, counts, protected, valid = (t[:1, :1] for t in case(device, n))
    kept = selection.top_k(scores, counts, protected, valid, width=int(counts.max()))
    assert torch.equal(kept.indices.cpu(), expected(scores.cpu(), counts, protected, valid, int(counts.max())))


def test_extremes(device):
    scores = torch.tensor([[[float("-inf"), 1e38, -1e38, float("inf"), -0.0, 0.0, NAN, 1e-45]]], device=device)
    valid = torch.ones(1, 1, 8, dtype=torch.bool, device=device)
    nobody = torch.zeros_like(valid)

    def kept(count, protected=nobody, mask=valid):
        counts = torch.tensor([[count]], device=device)
        return selection.top_k(scores, counts, protected, mask, width=count).indices[0, 0].tolist()

    assert kept(0) == []
    assert kept(1) == [3]
    assert kept(2) == [1, 3]
    assert kept(3) == [1, 3, 7]
    assert kept(4) == [1, 3, 4, 7]  # of -0 and 0 the first
    assert kept(6) == [1, 2, 3, 4, 5, 7]
    assert kept(7) == [0, 1, 2, 3, 4, 5, 7], "NaN goes before anything else"
    assert kept(8) == list(range(8))
    nan = nobody | scores.isnan()
    assert kept(1, protected=nan) == [6], "protected, even if NaN"


@pytest.mark.usefixtures("seed")
def test_one_set_for_all_heads(device):
    """Scope `layer` hands the same scores to every head, expanded: strides of 0."""
    scores, counts, protected, valid = (t[:, :1].expand(-1, 3, *t.shape[2:]) for t in case(device, 90))
    kept = selection.top_k(scores, counts, protected, valid, width=80)
    assert torch.equal(kept.indices.cpu(), expected(scores.cpu(), counts, protected, valid, 80))


def test_no_slots_and_wrong_arguments(device):
    empty = torch.zeros(2, 3, 0, device=device)
    none = empty.bool()
    counts = torch.zeros(2, 3, dtype=torch.int64, device=device)
    assert selection.top_k(empty, counts, none, none).indices.shape == (2, 3, 0)
    assert selection.top_k(empty, counts, none, none, width=2).indices.tolist() == [[[0, 0]] * 3] * 2
    for arguments, message in (
        ((empty.double(), counts, none, none), r"scores is torch\.float64; give torch\.float32"),
        ((empty, counts.int(), none, none), r"counts is torch\.int32"),
        ((empty, counts[:1], none, none), "counts has shape"),
        ((empty, counts, none[:1], none), "protected has shape"),
        ((empty, counts, none, none.float()), r"valid is torch\.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            selection.top_k(*arguments)


def keep(device, n, columns):
    """Ascending indices of different lengths, padded as the operation pads them."""
    indices = torch.zeros(2, 2, columns, dtype=torch.int64)
    lengths = torch.randint(0, columns + 1, (2, 2))
    lengths[1, 1] = columns
    for b in range(2):
        for h in range(2):
            length = int(lengths[b, h])
            chosen = torch.randperm(n)[:length].sort().values
            indices[b, h, :length] = chosen
            indices[b, h, length:] = chosen[-1] if length else 0
    return KeepIndices(indices.to(device), lengths.to(device))


TENSORS = {
    "keys bf16 128": lambda n: torch.randn(3, 2, 2, n + 3, 128).bfloat16(),
    "keys fp16 64": lambda n: torch.randn(3, 2, 2, n + 3, 64).half(),
    "keys fp32 64": lambda n: torch.randn(3, 2, 2, n + 3, 64),
    "values fp16 40": lambda n: torch.randn(3, 2, 2, n + 3, 40).half(),
    "fp8": lambda n: torch.randn(3, 2, 2, n + 3, 64).to(torch.float8_e4m3fn),
    "positions": lambda n: torch.randint(0, 9999, (3, 2, 2, n + 3), dtype=torch.int32),
    "int64": lambda n: torch.randint(0, 2**60, (3, 2, 2, n + 3)),
    "flags": lambda n: torch.rand(3, 2, 2, n + 3) > 0.5,
    "matrix state": lambda n: torch.randn(3, 2, 2, n + 3, 3, 5),
    "odd bytes": lambda n: torch.randint(0, 99, (3, 2, 2, n + 3, 7), dtype=torch.int8),
    "sequence first": lambda n: torch.randn(3, 2, n + 3, 2, 64).half().transpose(2, 3),
}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dtype != torch.bool else tensor


@pytest.mark.usefixtures("seed", "grid_order")
@pytest.mark.parametrize("kind", TENSORS)
def test_compaction_moves_bits(kind, device):
    n = random.randint(20, 50)
    arena = TENSORS[kind](n).to(device)
    kept = keep(device, n, random.randint(1, n))
    before = arena.clone()
    want = arena.clone()
    for b in range(2):
        for h in range(2):
            for column, source in enumerate(kept.indices[b, h].tolist()):
                want[1, b, h, column] = before[1, b, h, source]
    compaction.compact(arena[1], kept)
    assert torch.equal(bits(arena), bits(want)), "exactly the kept slots of the one layer move"


@pytest.mark.usefixtures("seed")
def test_layers_in_one_launch_and_keeping_everything(device):
    arena = torch.randn(2, 2, 2, 40, 64, device=device).half()
    kept = keep(device, 40, 25)
    indices = torch.cat([kept.indices, kept.indices.flip(0)])
    want = arena.clone()
    compaction.compact(want[0], kept)
    compaction.compact(want[1], KeepIndices(kept.indices.flip(0), kept.lengths.flip(0)))
    compaction.compact(arena.flatten(0, 1), KeepIndices(indices, kept.lengths.repeat(2, 1)))
    assert torch.equal(arena, want)
    everything = torch.arange(40, device=device).expand(4, 2, 40)
    compaction.compact(arena.flatten(0, 1), KeepIndices(everything, torch.full((4, 2), 40)))
    assert torch.equal(arena, want)
    compaction.compact(arena[0], KeepIndices(everything[:2, :, :0], torch.zeros(2, 2, dtype=torch.int64)))
    assert torch.equal(arena, want)


def test_storages_that_cannot_be_moved_are_refused(device):
    kept = KeepIndices(torch.zeros(2, 2, 3, dtype=torch.int64, device=device), torch.full((2, 2), 3))
    storage = torch.zeros(2, 2, 8, 4, device=device)
    for wrong, message in (
        (storage.transpose(2, 3).contiguous().transpose(2, 3), "must be a contiguous piece"),
        (storage[:, :1].expand(2, 2, 8, 4), "of its own"),
        (storage[:, :, :2], "3 columns but the storage holds 2"),
        (storage[:1], r"kept\.indices has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            compaction.compact(wrong, kept)
    with pytest.raises(ValueError, match=r"kept\.indices is torch\.int32"):
        compaction.compact(storage, KeepIndices(kept.indices.int(), kept.lengths))
