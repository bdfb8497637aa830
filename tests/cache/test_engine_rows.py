"""Engine: what is taken back, rows that move, and misuse."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvsupport.engine_driver import CPU, DIM, POLICIES, Driver, RowText


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_what_is_cropped_and_fed_again_leaves_no_trace(fields):
    straight, cropped = Driver([1, 2], **fields), Driver([1, 2], **fields)
    for driver in (straight, cropped):
        driver.feed("...xxxxxxxxx", "x" * 12)
        for step in range(40):
            if driver is cropped and step % 5 == 2:
                room = min(row.seen - row.floor for row in driver.engine.rows)
                count = min(step % 3 + 1, room)
                driver.engine.crop(count)
                driver.at = [at - count for at in driver.at]
                driver.engine.crop(0)
                driver.steps(count)
            driver.steps(1)
        driver.engine.settle()
    for b in (0, 1):
        assert straight.kept(b) == cropped.kept(b)
        assert straight.engine.rows[b].compactions == cropped.engine.rows[b].compactions


def test_a_crop_counts_tokens_and_not_padding():
    driver = Driver([1, 2])
    driver.feed("..xx", "xxxx")
    driver.feed("x.x", "xxx")
    driver.engine.crop(2)
    assert [(row.seen, row.resident) for row in driver.engine.rows] == [(3, 3), (5, 5)]
    assert driver.engine.columns == 5
    driver.engine.crop(4)
    assert [(row.seen, row.resident, row.prompt) for row in driver.engine.rows] == [(0, 0, 0), (1, 1, 1)]
    driver.at = [0, 1]
    driver.feed("xxx", "x.x")
    driver.check_contents()


def test_a_crop_does_not_reach_behind_a_compaction():
    driver = Driver([1, 2])
    driver.feed("x" * 17, "....xxxxxxxxxxxxx")
    driver.steps(5)
    assert [row.floor for row in driver.engine.rows] == [20, 0]
    driver.engine.crop(2)
    state = [vars(row).copy() for row in driver.engine.rows]
    with pytest.raises(CacheStateError, match="was at token 20 of 20; crop at most 0 tokens"):
        driver.engine.crop(1)
    with pytest.raises(CacheStateError, match="99 tokens are more than the 20"):
        driver.engine.crop(99)
    assert [vars(row) for row in driver.engine.rows] == state
    driver.at = [20, 16]
    driver.steps(1)
    driver.check_contents()


def test_a_crop_back_to_the_prompt_forgets_that_decoding_began():
    driver = Driver([1])
    driver.feed("x" * 25)
    driver.steps(1)
    driver.engine.crop(1)
    driver.at = [25]
    assert not driver.engine.decoding
    driver.steps(1)
    assert driver.engine.rows[0].compactions == 0
    assert driver.engine.rows[0].prompt == 25
    driver.steps(1)
    assert driver.engine.rows[0].compactions == 1


def test_a_later_mask_can_hide_tokens_until_the_row_is_compacted():
    driver = Driver([1, 2])
    driver.feed("..xxx", "xxxxx")
    driver.feed("xxx", "xxx")
    past = torch.tensor([[letter == "x" for letter in row] for row in ("..xxxx..", "xxxxxxxx")])
    driver.engine.hide(past)
    driver.engine.hide(past)
    assert driver.kept(0)[0][0] == [0, 1, 2, 3]
    assert driver.kept(1)[0][0] == list(range(8))
    driver.at[0] -= 2  # the tokens that are hidden never were
    driver.steps(1)
    assert driver.kept(0)[0][0] == [0, 1, 2, 3, 4]
    driver.check_contents()
    with pytest.raises(CacheStateError, match="padding before"):
        driver.engine.hide(torch.ones(2, 9, dtype=torch.bool))
    driver.steps(20)
    hidden = torch.ones(2, driver.engine.columns, dtype=torch.bool)
    hidden[0, :2] = hidden[0, 6:8] = hidden[1, 3] = False
    with pytest.raises(CacheStateError, match="compacted since"):
        driver.engine.hide(hidden)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_rows_can_be_reordered_repeated_and_selected(fields):
    """As beam search does, at every step."""
    index = torch.tensor([2, 0, 0])
    driver = Driver([1, 2, 3], **fields)
    driver.feed("...xxxxxxxxx", "x" * 12, ".xxxxxxxxxxx")
    driver.steps(7)
    driver.engine.take_rows(index)
    driver.texts, driver.at = [driver.texts[b] for b in index], [driver.at[b] for b in index]
    driver.steps(30)
    driver.engine.settle()
    driver.check_contents()
    assert driver.kept(1) == driver.kept(2)
    for b, (seed, prompt) in enumerate(((3, 11), (1, 9))):
        alone = Driver([seed], **fields)
        alone.feed("x" * prompt)
        alone.steps(37)
        alone.engine.settle()
        assert alone.kept(0) == driver.kept(b)


def test_a_copied_row_goes_its_own_way():
    driver = Driver([1, 2])
    driver.feed("x" * 12, "x" * 12)
    driver.engine.take_rows(torch.tensor([0, 0]))
    driver.steps(20)
    assert driver.kept(0) != driver.kept(1)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_a_clone_is_independent(fields):
    driver = Driver([1], **fields)
    driver.feed("x" * 12)
    driver.steps(9)
    twin = Driver([1], **fields)
    twin.engine, twin.at = driver.engine.clone(), list(driver.at)
    kept, rows = driver.kept(0), [vars(row).copy() for row in driver.engine.rows]
    twin.texts = [RowText(5, twin.heads)]
    twin.steps(30)
    assert driver.kept(0) == kept
    assert [vars(row) for row in driver.engine.rows] == rows
    driver.steps(30)
    driver.engine.settle()
    straight = Driver([1], **fields)
    straight.feed("x" * 12)
    straight.steps(39)
    straight.engine.settle()
    assert driver.kept(0) == straight.kept(0)


def test_reset_starts_over():
    driver = Driver([1], **POLICIES["accumulated"])
    driver.feed("x" * 12)
    driver.steps(30)
    driver.engine.settle()
    kept = driver.kept(0)
    driver.engine.reset()
    assert driver.engine.columns == 0
    driver.at = [0]
    driver.feed("x" * 12)
    driver.steps(30)
    driver.engine.settle()
    assert driver.kept(0) == kept


def test_a_forward_pass_that_stopped_half_way_is_noticed():
    driver = Driver([1])
    driver.feed("xxxx")
    driver.engine.open(1, 1, None, CPU, kind="decode")
    with pytest.raises(CacheStateError, match="stopped before layer 0"):
        driver.engine.open(1, 1, None, CPU, kind="decode")
    driver.engine.settle()  # does nothing
    driver.engine.reset()
    driver.at = [0]
    driver.feed("xxxx")


def test_another_batch_size_is_refused():
    driver = Driver([1])
    driver.feed("xxxx")
    with pytest.raises(CacheStateError, match="holds 1 rows but the forward pass has 3"):
        driver.engine.open(3, 1, None, CPU, kind="decode")


def test_a_layer_cannot_be_updated_twice_or_change_its_type():
    driver = Driver([1])
    driver.feed("xxxx")
    keys = torch.zeros(1, 2, 1, DIM)
    with pytest.raises(UnsupportedError):
        driver.engine.append(0, keys, keys)
    driver.engine.open(1, 1, None, CPU, kind="decode")
    with pytest.raises(UnsupportedError, match=r"float16 keys on cpu but its cache is torch\.float32"):
        driver.engine.append(0, keys.half(), keys.half())
    with pytest.raises(UnsupportedError, match="3 KV heads of size 8"):
        driver.engine.append(0, torch.zeros(1, 3, 1, DIM), torch.zeros(1, 3, 1, DIM))
    driver.engine.append(0, keys, keys)
    driver.engine.append(2, keys, keys)
