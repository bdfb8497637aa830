"""Write docs/vllm-policies.md from the bundled policies: `python scripts/vllm_policies.py` (`--check` compares)."""

from __future__ import annotations

import sys
from pathlib import Path

import kvpolicy
from kvpolicy import Policy
from kvpolicy.runtimes.vllm.refusals import policy_refusal
from kvpolicy.testing.tables import stand_in_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "vllm-policies.md"
HEAD = """\
# Policies in vLLM

What becomes of every bundled policy when it is served by vLLM ([serving.md](serving.md)); one of your own is asked the
same questions when the engine starts. Made by `python scripts/vllm_policies.py` from the same refusals.

A policy is served when every head of every layer keeps as many entries as the others, positions stay, and what its
components need can be had of packed requests. A prompt counts as one, in however many pieces vLLM computes it.

| policy | in vLLM | what to know |
| --- | --- | --- |
"""


def notes(policy: Policy) -> str:
    """Return what somebody who serves a policy should know of it."""
    found = []
    if policy.phase != "prefill" and policy.trigger.buffer() < 2:
        found.append('compacts before every token; `"set": {"trigger": {"every": 128}}` does it in steps, far faster')
    if policy.phase == "prefill":
        found.append("compacts the prompt only: what is decoded stays, so that requests are promised their full length")
    if policy.prefill_chunk is not None and policy.phase != "decode":
        found.append(
            f"compacts between pieces of the prompt: `--max-num-batched-tokens {policy.prefill_chunk}`; beside other "
            "requests vLLM cuts smaller pieces, and what is kept of a long prompt may differ from what is kept alone"
        )
    if policy.reserved(10_000) > policy.reserved() + 1:
        found.append("a request whose prompt leaves no room in the budget is not compacted")
    if "attention" in policy.needs:
        found.append("attention weights are computed once more, from recorded queries")
    return "; ".join(found)


def page() -> str:
    """Return what the page should say."""
    rows = []
    with stand_in_tables():
        for entry in sorted(kvpolicy.catalog().policies(), key=lambda each: each.name):
            policy = kvpolicy.load(entry.name).build()
            why = policy_refusal(policy)
            said = notes(policy) if why is None else why.removeprefix(f"policy {policy.name!r} ").rstrip(".")
            rows.append(f"| {policy.name} | {'served' if why is None else 'refused'} | {said} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/vllm-policies.md is out of date; run python scripts/vllm_policies.py")
