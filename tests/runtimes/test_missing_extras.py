"""A module of an extra that is not installed names the extra."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

LM_EVAL = "kvpolicy.runtimes.hf.lm_eval"


def test_the_worker_without_vllm_names_the_extra(monkeypatch):
    vllm = importlib.import_module("kvpolicy.runtimes.vllm")
    monkeypatch.setattr(vllm, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"kvpolicy\.runtimes\.vllm needs vllm; .*pip install 'kvpolicy\[vllm\]'\.$"):
        vllm.Worker  # noqa: B018


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_names_the_extra_when_imported_and_when_run():
    with pytest.raises(ImportError, match=r"needs lm-eval; install it with: pip install 'kvpolicy\[lm-eval\]'\.$"):
        importlib.import_module(LM_EVAL)
    done = subprocess.run([sys.executable, "-P", "-m", LM_EVAL], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {LM_EVAL} needs lm-eval;")
    assert "Traceback" not in done.stderr
