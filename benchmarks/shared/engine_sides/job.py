"""What `engines.py` and `vllm_pressure.py` ask of an engine, and how they are answered: JSON in, JSON out.

Each engine runs in a process and an interpreter of its own, on one core. Nothing of kvpolicy is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Job:
    """Requests that all arrive at once, each of which is to get the same number of tokens, greedily.

    Attributes:
        model: its folder, as the engine needs it.
        prompts: token ids.
        tokens: to generate for each prompt, whatever they are.
        policy: a policy of kvpolicy, or what the engine calls its own; None for the full cache.
        budget: entries to keep; `interval` more are held between two compactions.
        blocks: blocks of 32 entries for keys and values; None for ample room.
    """

    model: str
    prompts: list[list[int]]
    tokens: int
    policy: str | None = None
    budget: int = 256
    interval: int = 128
    blocks: int | None = None

    @property
    def most(self) -> int:
        """Entries of the longest request under the full cache."""
        return max(map(len, self.prompts)) + self.tokens

    @property
    def wanted_blocks(self) -> int:
        """Blocks of the pool: as asked for, or room for everything."""
        return self.blocks or 1 + len(self.prompts) * (1 + -(-self.most // BLOCK))


BLOCK = 32


@dataclass
class Answer:
    """What a job took.

    Attributes:
        wall, cpu: seconds of generation, without loading; `cpu` is that of all threads of the process.
        outputs: the tokens of each request.
        versions: of the packages that did the work.
        more: whatever else the engine says about itself (steps, preemptions, times of tokens).
    """

    wall: float
    cpu: float
    outputs: list[list[int]]
    versions: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)


def timed(generate: Callable[[], Sequence[Sequence[int]]], *packages: str) -> Answer:
    """Time one call that returns the tokens of each request."""
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = generate()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Answer(wall, cpu, [[int(t) for t in out] for out in outputs], {name: version(name) for name in packages})


def serve(run: Callable[[Job], Answer]) -> None:
    """Read a job from standard input and print the answer; what libraries print goes to standard error."""
    out = os.dup(1)
    os.dup2(2, 1)  # also what is printed below Python
    answer = run(Job(**json.load(sys.stdin)))
    with os.fdopen(out, "w") as stream:
        json.dump(asdict(answer), stream)
