"""The last queries: how many are held, for which row, and what a rollback leaves."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import Rope
from kvpolicy.cache.queries.log import QueryLog
from kvpolicy.cache.queries.statistics import QueryStatistics


class Feeder:
    """Feeds a log with queries that hold their own position, layer and row."""

    def __init__(self, observe: int, rows: int = 1, *, attention: bool = False) -> None:
        self.log = QueryLog(observe, feeds_attention=attention)
        self.seen = [0] * rows

    def feed(self, *mask: str) -> None:
        valid = torch.tensor([[letter == "x" for letter in row] for row in mask])
        rank = valid.long().cumsum(1)
        positions = (torch.tensor(self.seen)[:, None] + rank - 1).to(torch.int32)
        counts = valid.sum(1).tolist()
        self.log.open(positions, valid, counts, ragged=not bool(valid.all()))
        for layer in (0, 1):
            row = torch.arange(len(mask))[:, None].expand_as(positions)
            queries = torch.stack([positions, row, torch.full_like(positions, layer)], -1).float()
            self.log.put(layer, queries[:, None].expand(-1, 4, -1, -1).contiguous())
        self.seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]

    def window(self, layer: int = 1) -> list[list[int]]:
        """Positions of the valid queries of each row, checked against the queries themselves."""
        window = self.log.window()
        assert window is not None
        queries = self.log.gather(layer, window)
        found = []
        for b in range(len(self.seen)):
            good = window.valid[b]
            assert queries[b, 2, good, 0].tolist() == window.positions[b, good].tolist()
            assert set(queries[b, 2, good, 1].tolist()) <= {float(b)}
            assert set(queries[b, 2, good, 2].tolist()) <= {float(layer)}
            found.append(sorted(window.positions[b, good].tolist()))
        return found


def _last(seen: int, count: int) -> list[int]:
    return list(range(max(seen - count, 0), seen))


@pytest.mark.parametrize("observe", [1, 4, 8])
@pytest.mark.parametrize("prompt", [1, 3, 8, 100])
def test_the_window_is_the_last_queries(observe, prompt):
    feeder = Feeder(observe)
    feeder.feed("x" * prompt)
    assert feeder.window() == [_last(prompt, observe)]
    for step in range(30):
        feeder.feed("x")
        assert feeder.window() == [_last(prompt + step + 1, observe)]


def test_rows_have_windows_of_their_own():
    feeder = Feeder(4, 3)
    for mask in (("x" * 9, "......xxx", "........x"), ("x", ".", "x"), ("xxx", ".x.", "x.x"), ("x", "x", ".")):
        feeder.feed(*mask)
        assert feeder.window() == [_last(seen, 4) for seen in feeder.seen]
    for _ in range(40):
        feeder.feed("x", ".", "x")
        assert feeder.window() == [_last(seen, 4) for seen in feeder.seen]


def test_padding_at_the_end_of_a_long_prompt_does_not_cost_a_row_its_window():
    feeder = Feeder(4, 2)
    feeder.feed("x" * 200, "x" * 50 + "." * 150)
    assert feeder.window() == [_last(200, 4), _last(50, 4)]


def test_what_is_held_does_not_grow():
    feeder = Feeder(8)
    feeder.feed("x" * 300)
    assert feeder.log.records[0].width < 300
    held = []
    for _ in range(200):
        feeder.feed("x")
        held.append(sum(record.width for record in feeder.log.records))
    assert max(held[-50:]) <= max(held[50:100]) < 100


def test_nothing_is_recorded_for_a_policy_that_asks_for_nothing():
    log = QueryLog(0, feeds_attention=False)
    assert not log.active
    assert log.window() is None


def test_decode_steps_are_not_copied():
    log = QueryLog(4, feeds_attention=False)
    one = torch.ones(1, 1, dtype=torch.bool)
    queries = torch.randn(1, 4, 1, 2)
    log.open(torch.zeros(1, 1, dtype=torch.int32), one, [1], ragged=False)
    log.put(0, queries)
    assert log.records[0].queries[0].data_ptr() == queries.data_ptr()
    # A prompt's queries are: a view of the last few would keep all of them alive.
    long = torch.randn(1, 4, 500, 2)
    log.open(torch.zeros(1, 500, dtype=torch.int32), one.expand(1, 500), [500], ragged=False)
    log.put(0, long)
    held = log.records[-1].queries[0]
    assert held.untyped_storage().nbytes() < long.untyped_storage().nbytes()
    assert torch.equal(held, long[:, :, -held.shape[2] :])


@pytest.mark.parametrize("observe", [1, 4, 8])
@pytest.mark.parametrize("last", [1, 2, 5, 40])
def test_the_window_survives_taking_back_the_last_pass(observe, last):
    """Candidates of assisted decoding are taken back, and a compaction may come right after."""
    for taken in range(1, last + 1):
        feeder = Feeder(observe)
        feeder.feed("x" * 60)
        for _ in range(10):
            feeder.feed("xx")
        feeder.feed("x" * last)
        feeder.log.crop(taken)
        feeder.seen = [feeder.seen[0] - taken]
        assert feeder.window() == [_last(feeder.seen[0], observe)]


def test_a_prompt_can_be_taken_back_in_part():
    feeder = Feeder(8)
    feeder.feed("x" * 200)
    feeder.log.crop(50)
    feeder.seen = [150]
    assert feeder.window() == [_last(150, 8)]
    feeder.feed("x")
    assert feeder.window() == [_last(151, 8)]


def test_a_crop_of_padding_takes_no_queries():
    feeder = Feeder(4, 2)
    feeder.feed("x" * 6, "..xxxx")
    feeder.feed("x..", "xxx")
    feeder.log.crop(2)
    feeder.seen = [7, 5]
    assert feeder.window() == [_last(7, 4), _last(5, 4)]


def test_every_query_waits_until_it_has_been_observed():
    feeder = Feeder(2, attention=True)
    feeder.feed("x" * 10)
    for _ in range(30):
        feeder.feed("x")
    assert feeder.log.unobserved == 40
    assert sum(record.width for record in feeder.log.records) == 40
    for record in feeder.log.records:
        record.unobserved = 0
    for _ in range(60):
        feeder.feed("x")
        feeder.log.records[-1].unobserved = 0
    assert sum(record.width for record in feeder.log.records) < 40
    assert feeder.window() == [_last(100, 2)]


def test_crop_counts_what_is_unobserved():
    feeder = Feeder(2, attention=True)
    feeder.feed("x" * 10)
    feeder.feed("xxx")
    feeder.log.crop(2)
    assert feeder.log.unobserved == 11
    feeder.log.crop(4)
    assert feeder.log.unobserved == 7


def test_rows_are_reordered():
    feeder = Feeder(3, 2)
    feeder.feed("xxxxx", "..xxx")
    feeder.log.rows(torch.tensor([1, 1, 0]))
    window = feeder.log.window()
    queries = feeder.log.gather(0, window)
    assert [sorted(window.positions[b, window.valid[b]].tolist()) for b in range(3)] == [
        [0, 1, 2],
        [0, 1, 2],
        [2, 3, 4],
    ]
    assert [set(queries[b, 0, window.valid[b], 1].tolist()) for b in range(3)] == [{1.0}, {1.0}, {0.0}]


def test_a_clone_goes_its_own_way():
    feeder = Feeder(3)
    feeder.feed("xxxxx")
    twin = feeder.log.clone()
    for _ in range(20):
        feeder.feed("x")
    assert twin.window().positions.tolist() == [[2, 3, 4]]
    twin.crop(1)
    assert feeder.window() == [[22, 23, 24]]


def test_what_is_gathered_holds_on_to_nothing_but_the_window():
    feeder = Feeder(8)
    for _ in range(3):
        feeder.feed("x" * 72)
    feeder.feed("x")
    queries = feeder.log.gather(1, feeder.log.window())
    assert queries.untyped_storage().nbytes() == queries.numel() * queries.element_size() == 4 * 8 * 3 * 4


def test_statistics_may_begin_in_inference_mode_and_go_on_outside():
    """A runtime may run the model in inference mode and open its steps outside, as the transformers runtime does."""
    queries = torch.randn(1, 2, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    positions, valid = torch.arange(4, 16, dtype=torch.int32)[None], torch.ones(1, 12, dtype=torch.bool)
    rope = Rope(torch.tensor([1.0, 0.5, 0.1, 0.02]))
    with torch.inference_mode():
        made = QueryStatistics.empty(queries)
        made.add(queries[..., :5, :], positions[:, :5], valid[:, :5], rope)
    made.add(queries[..., 5:, :], positions[:, 5:], valid[:, 5:], rope)
    whole = QueryStatistics.empty(queries)
    whole.add(queries, positions, valid, rope)
    parts, at_once = (each.extras(slice(0, 1))["query_covariance"] for each in (made, whole))
    # Products of either sign cancel, so that rounding is that of the summands, which are about 1.
    torch.testing.assert_close(parts, at_once, rtol=0, atol=1e-6)
