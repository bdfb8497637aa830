"""Write docs/models.md anew: try every model type of the installed transformers, each in a process of its own.

`python -P scripts/models.py llama gpt2` tries these only; the rest of the page stays.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
import transformers

from kvsupport.model_table import PAGE, ModelRow, cell, page, written
from kvsupport.shrinking import CAUSAL, IMAGE_TEXT, CannotBuildError, tiny_of
from kvsupport.sweep import FEW, POLICIES, sweep

_MEMORY = 6 << 30
_SECONDS = 120


def _try(family: str, answers: multiprocessing.SimpleQueue[ModelRow]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    policies = POLICIES if family in CAUSAL else FEW
    try:
        outcome = sweep(tiny_of(family), policies)
        answers.put(ModelRow(outcome.model, policies, cell(outcome)))
    except CannotBuildError as error:
        answers.put(ModelRow("", policies, f"not built: {str(error).rstrip('.:').replace('|', '/')}"))


def main(chosen: list[str]) -> int:
    """Try the chosen model types, all without any; return the exit status: 1 where a fault was found."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sweep(tiny_of("llama"), ("rkv",))  # what is imported late is imported before the processes part
    found = dict(written()[1]) if chosen else {}
    context = multiprocessing.get_context("fork")
    for family in chosen or [*CAUSAL, *IMAGE_TEXT]:
        answers = context.SimpleQueue()
        worker = context.Process(target=_try, args=(family, answers))
        worker.start()
        worker.join(_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
        if worker.exitcode == 0:
            found[family] = answers.get()
        else:
            found[family] = ModelRow("", POLICIES, f"not built: it takes more than {_SECONDS} s or {_MEMORY >> 30} GiB")
        print(family, found[family].name, found[family].text, flush=True)
        PAGE.write_text(page(found), encoding="utf-8")
    return int(any("FAULT" in row.text for row in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
