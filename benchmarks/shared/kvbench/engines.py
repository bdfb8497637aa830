"""Requests for engines that run beside this process, each in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path

from job import Answer, Job
from transformers import AutoTokenizer

_SIDES = Path(__file__).resolve().parents[1] / "engine_sides"


def prompts(model: Path, count: int) -> list[list[int]]:
    """Return the tokens of requests that end in long answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = (f"Tell me a long story number {i} about a sailor, step by step." for i in range(count))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in asked
    ]


def answer(engine: str, python: str, job: Job, core: int | None, limit: float) -> Answer | str:
    """Give a job to an engine in an interpreter of its own; return what it answered, or why it did not.

    Args:
        engine: transformers, vllm or openvino.
        python: the interpreter that has it.
        job: what to do.
        core: number of the one core that it may use; None for any.
        limit: seconds.
    """
    command = [python, str(_SIDES / f"in_{engine}.py")]
    try:
        ended = subprocess.run(  # noqa: S603 - interpreters that the user names
            command,
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            preexec_fn=None if core is None else partial(os.sched_setaffinity, 0, {core}),
        )
    except subprocess.TimeoutExpired:
        return f"not done within {limit:.0f} s"
    if ended.returncode:
        return (ended.stderr.strip() or f"ended with {ended.returncode}").splitlines()[-1]
    return Answer(**json.loads(ended.stdout))
