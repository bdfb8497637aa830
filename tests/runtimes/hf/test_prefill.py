"""`prefill` fills the cache, in chunks or in one pass, and leaves the end of the prompt to `generate`."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache


@pytest.mark.parametrize(("chunk", "declared", "seen"), [(None, None, 39), (None, 16, 24), (7, 16, 33), (100, None, 0)])
def test_what_is_run_and_what_is_left(chunk, declared, seen, tiny, compose, random_prompts):
    ids = torch.tensor(random_prompts(40))
    with PolicyCache(compose(prefill_chunk=declared), tiny()) as cache:
        cache.prefill(ids, chunk=chunk)
        assert cache.get_seq_length() == seen
        text = tiny().generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache)
    with PolicyCache(compose(), tiny()) as cache:
        assert torch.equal(text, tiny().generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache))


def test_of_one_token_nothing_is_run_and_later_turns_go_on(tiny, compose, random_prompts):
    ids = torch.tensor(random_prompts(30))
    with PolicyCache(compose(), tiny()) as cache:
        cache.prefill(ids[:, :1])
        assert cache.get_seq_length() == 0
        for end in (12, 13, 30):
            cache.prefill(ids[:, :end])
            assert cache.get_seq_length() == end - 1


def test_declared_chunks_alone_run_nothing_without_a_declaration(tiny, compose, random_prompts):
    ids = torch.tensor(random_prompts(30))
    for declared, seen in ((None, 0), (8, 22)):
        with PolicyCache(compose(prefill_chunk=declared), tiny()) as cache:
            cache.prefill_chunks(ids)
            assert cache.get_seq_length() == seen


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_policy_that_needs_the_prompt_in_one_piece_refuses(chunk, tiny, small, random_prompts):
    with PolicyCache(small("compactor"), tiny()) as cache, pytest.raises(UnsupportedError, match="in one piece"):
        cache.prefill(torch.tensor(random_prompts(30)), chunk=chunk)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ("a text", "str"),
        ([1, 2, 3], "list"),
        (torch.tensor([1, 2, 3]), r"a tensor of shape \[3\]"),
        (BatchEncoding({"input_ids": torch.tensor([[1, 2, 3]])}), "BatchEncoding"),
    ],
)
def test_what_is_no_tensor_of_rows_is_one_sentence(given, got, tiny, compose):
    with PolicyCache(compose(), tiny()) as cache:
        for read in (cache.prefill, cache.read):
            with pytest.raises(
                CacheStateError, match=rf"input_ids: should be a tensor .*\[\"input_ids\"\], got {got}\.$"
            ):
                read(given)
        assert cache.get_seq_length() == 0
