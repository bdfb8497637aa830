"""A project that uses kvpolicy, as a stranger writes it: what type checkers must accept in it, and what not."""

from __future__ import annotations

from pathlib import Path
from typing import Final

RIGHT: Final = '''\
"""Uses kvpolicy as its pages say."""

from __future__ import annotations

import kvpolicy
import torch
from kvpolicy import CacheView, ImportanceScorer, Policy, PolicySpec, hookimpl
from kvpolicy.loading.hookspecs import RegisterComponent
from kvpolicy.runtimes.hf import CacheStats, PolicyCache, generate
from kvpolicy.types import Scores
from transformers import PreTrainedModel


class Loudest(ImportanceScorer):
    """The largest number in an entry's value."""

    scale: float = 1.0

    def score(self, view: CacheView) -> Scores:
        return self.scale * view.values.float().abs().amax(-1).masked_fill(~view.valid, 0.0)


@hookimpl
def kvpolicy_register_components(register: RegisterComponent) -> None:
    register("loudest", Loudest)


def run(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, list[int]]:
    spec: PolicySpec = kvpolicy.load("rkv", budget=512, mixer__weight=0.3).replace({"trigger.every": 64})
    policy: Policy = spec.build()
    bound: int | None = policy.bound
    with PolicyCache(policy, model) as cache:
        generate(model, {"input_ids": ids}, cache, max_new_tokens=8)
        stats: CacheStats = cache.stats()
        kept: list[int] = cache.kept(layer=0, head=0)
    return stats.resident + (bound or 0), kept
'''
"""Nothing is wrong in it."""

WRONG: Final = {
    'kvpolicy.load("rkv", budget="many")': "budget",
    "kvpolicy.load(3)": "a name",
    'kvpolicy.load("rkv").build().bound + "x"': "bound",
    "kvpolicy.load('rkv').policy.nothing": "nothing",
    "kvpolicy.nothing": "no such name",
}
"""Expressions in which a type checker finds something, and what is wrong with each."""


def write(folder: Path, body: str) -> Path:
    """Write a module of the project and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "downstream.py"
    path.write_text(body, encoding="utf-8")
    return path


def wrong_module() -> str:
    """Return a module with each of the wrong expressions in a line of its own, and nothing else."""
    return "import kvpolicy\n\n" + "".join(f"print({expression})\n" for expression in WRONG)
