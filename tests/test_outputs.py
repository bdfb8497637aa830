"""Files for users are there whole or not at all, and never written through a link."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from kvpolicy import KVPolicyError, outputs
from kvpolicy.cli import main
from kvpolicy.errors import TableError
from kvpolicy.outputs import replace_file
from kvpolicy.tables import Table, save_table


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    replace_file(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"
    with path.open(encoding="utf-8") as reader:
        replace_file(path, b"new")
        assert reader.read() == "old é", "whoever has it open keeps what was there"
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_the_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "a").chmod(0o604)
    replace_file(tmp_path / "a", "y")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_whatever_fails_the_old_file_stays_and_nothing_is_left(tmp_path, monkeypatch, step):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif step == "replace":
        monkeypatch.setattr(type(path), "replace", full)
    else:
        monkeypatch.setattr(outputs, "_write", full)
    with pytest.raises(KVPolicyError) as caught:
        replace_file(path, "new", "--html")
    assert str(caught.value) == f"--html: {path} cannot be written (No space left on device); name another file."
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]


def test_nothing_is_written_through_a_link_or_into_what_is_no_file(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for name, what in {"link": "a symbolic link", "nowhere": "a symbolic link", "pipe": "no ordinary file"}.items():
        with pytest.raises(KVPolicyError, match=f"{name} is {what}; name an ordinary file"):
            replace_file(tmp_path / name, "mine", "--out")
    with pytest.raises(KVPolicyError, match="is a folder; name an ordinary file"):
        replace_file(tmp_path, "mine", "--out")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "none").exists()


def test_the_commands_write_through_no_link(tmp_path, capsys):
    (tmp_path / "link.json").symlink_to(tmp_path / "theirs")
    assert main(["schema", "--out", str(tmp_path / "link.json")]) == 1
    assert "link.json is a symbolic link; name an ordinary file." in capsys.readouterr().err
    table = Table("head_scores", "m", "x", 1, 2, 4, {"scores": torch.tensor([[0.0, 1.0]])})
    (tmp_path / "t.safetensors").symlink_to(tmp_path / "theirs")
    with pytest.raises(TableError, match="is a symbolic link"):
        save_table(table, tmp_path / "t.safetensors")
    assert not (tmp_path / "theirs").exists()


def test_a_plugin_is_there_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    real, count = outputs._write, []

    def second_fails(path, *rest):
        count.append(path)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(outputs, "_write", second_fails)
    assert main(["new", "plugin", "my-plugin", "--into", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert main(["new", "plugin", "my-plugin", "--into", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["my-plugin"]
