"""What a server says: what is in force when it starts, and why nothing is served as its last line."""

from __future__ import annotations

import os

import pytest

import kvpolicy
from kvpolicy.errors import SpecError
from kvpolicy.runtimes.vllm import metrics, words


@pytest.mark.parametrize(
    ("name", "budget", "said"),
    [("rkv", 512, "keeps 512 entries per KV head; while it decodes, a request holds at most 640, in 20 blocks;"),
     ("rkv", 0.25, "a compaction keeps 0.25 of the entries; what a request holds grows with it;"),
     ("snapkv-prefill", 512, "a compaction keeps 512 entries per KV head; all that is decoded stays beside them;")],
)  # fmt: skip
def test_a_server_says_what_is_in_force(caplog, name, budget, said):
    with caplog.at_level("INFO", "vllm.kvpolicy"):
        words.say_in_force(kvpolicy.load(name, budget).build(), 32, 1023)
    (message,) = caplog.messages
    assert message.startswith(f"kvpolicy: policy {name!r} is in force: ")
    assert said in message
    assert message.endswith("the pool has 1,023 blocks of 32.")


def test_the_process_that_made_the_folder_ends_with_the_refusal(tmp_path, capsys):
    folder = tmp_path / "told"
    with pytest.raises(SpecError, match="no such"), words.refusals_left_in(folder):
        raise SpecError("there is no such \x1b[31msetting; write budget.")
    assert folder.stat().st_mode & 0o077 == 0
    metrics._end(folder, -1)
    assert capsys.readouterr().err == ""
    metrics._end(folder, os.getpid())
    shown = capsys.readouterr().err
    assert shown.endswith("kvpolicy: the engine was refused: there is no such \\x1b[31msetting; write budget.\n")
    assert not folder.exists()


def test_what_a_later_engine_serves_is_not_called_refused(tmp_path, capsys):
    with pytest.raises(SpecError), words.refusals_left_in(tmp_path):
        raise SpecError("no.")
    words.forget_refusal(tmp_path)
    words.forget_refusal(tmp_path)
    words.repeat_refusal(tmp_path)
    assert capsys.readouterr().err == ""


def test_only_refusals_are_left_and_no_folder_is_needed(tmp_path):
    with pytest.raises(OSError, match="disk"), words.refusals_left_in(tmp_path):
        raise OSError("disk")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SpecError), words.refusals_left_in(None):
        raise SpecError("no.")
