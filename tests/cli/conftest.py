from __future__ import annotations

import pytest

from kvpolicy.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs a command and returns exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")  # a table may wrap

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
