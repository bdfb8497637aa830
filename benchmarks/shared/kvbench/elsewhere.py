"""Measurements in another interpreter, for what cannot be installed beside kvpolicy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

_SCRIPT = Path(__file__).resolve().parents[1] / "kvpress_side.py"


def kvpress_side(python: str, task: str, **options: object) -> dict[str, Any]:
    """Run a task of `kvpress_side.py`, with as many threads as here, and return what it printed.

    Raises:
        SystemExit: it failed; its own last line says why.
    """
    command = [python, "-P", str(_SCRIPT), "--threads", str(torch.get_num_threads()), task]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - the user names it
    if ended.returncode:
        reason = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise SystemExit(f"--kvpress: {python} failed ({reason}); it needs kvpress 0.5.5 and transformers below 5.3.")
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer
