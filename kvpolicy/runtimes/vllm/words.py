"""What the plugin says to who starts a server: what is in force, and, as the last line, why nothing is served.

A refusal is raised in a worker, whose traceback vLLM prints before those of the engine and the server, so that its
sentence is lost among them. It is therefore left in the folder that all processes of a server know, and said again by
the server when it ends.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.odd_text import harmless
from kvpolicy.policy.policy import Policy

_NAME: Final = "refusal"
_LONGEST: Final = 2000
_log = logging.getLogger("vllm.kvpolicy")  # vLLM shows what stands under its own name


def in_force(policy: Policy, block: int, blocks: int) -> str:
    """Return what a server says when it starts.

    Args:
        policy: the policy.
        block: slots per block of vLLM.
        blocks: of the pool that requests may hold.
    """
    budget = policy.budget
    stays = f"{budget.fraction:g} of the entries" if budget.tokens is None else f"{budget.tokens:,} entries per KV head"
    if policy.bound is not None:
        held = f"while it decodes, a request holds at most {policy.bound:,}, in {-(-policy.bound // block):,} blocks"
    elif policy.phase == "prefill":
        held = "all that is decoded stays beside them"
    else:
        held = "what a request holds grows with it"
    return (
        f"kvpolicy: policy {policy.name!r} is in force: a compaction keeps {stays}; {held}; the pool has {blocks:,} "
        f"blocks of {block}."
    )


def say_in_force(policy: Policy, block: int, blocks: int) -> None:
    """Say in vLLM's log what is in force; arguments as `in_force` takes them."""
    _log.info("%s", in_force(policy, block, blocks))


def forget_refusal(folder: Path | None) -> None:
    """Forget what was refused before, by an engine of the same process that now has another that runs."""
    if folder is not None:
        (folder / _NAME).unlink(missing_ok=True)


@contextmanager
def refusals_left_in(folder: Path | None) -> Iterator[None]:
    """Leave a refusal that is raised within in a folder (None: nowhere), and let it go on."""
    try:
        yield
    except KVPolicyError as error:
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _NAME).write_text(str(error)[:_LONGEST], "utf-8")
        raise


def repeat_refusal(folder: Path) -> None:
    """Print the refusal that was left in a folder, as the last line before the process ends; nothing without one."""
    try:
        reason = (folder / _NAME).read_text("utf-8")
    except OSError:
        return
    sys.stderr.write(f"\nkvpolicy: the engine was refused: {harmless(reason)}\n")
    sys.stderr.flush()
