"""Write docs/methods.md from the bundled policies: `python scripts/methods.py` (`--check` only compares)."""

from __future__ import annotations

import sys
from pathlib import Path

from kvpolicy.cli.methods import methods_markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
HEAD = """\
# Methods

Every bundled policy: what it is made of, when it runs, what it needs from the runtime, whether it really frees memory,
and where it departs from its paper. Parts that are not named are the usual ones: no redundancy, importance alone, the
same budget for every head, top-k per head. Made by `python scripts/methods.py` from the files in
`registry/kvpolicy_registry/policies`; `kvpolicy show NAME` prints one with all parameters.

"""
TAIL = """
## What is left out

- **FastKVzip** (arXiv:2601.17668): its gates are published as pickles of another form than those of KVzap and TRIM-KV,
  which `learned_gate` reads.
- **KVpop** (arXiv:2607.05061): its trained scorer, which has no public format; its delayed scoring is the component
  `delayed`, over any scorer.
- **KVP** (arXiv:2602.10238): a trained ranker for every head, without public weights.
- **counter-causal surprise** (arXiv:2607.27600): runs the tokens whose entries are held through all layers once more,
  each attending to the cached keys and values behind it only, and keeps those whose own token gets the smallest logit.
  That takes the model, its token ids and a second pass at each compaction; components see a layer's cache and none of
  these. Its approximation by the last layer alone keeps a hidden state for every entry and takes the model's last norm
  and head, and slot state is one number for each KV head.
- **Nexus Sampling** (arXiv:2606.23961): its walk over attention is not public beyond the abstract.
- **MomentKV** (arXiv:2606.01563): corrects the attention's output by what was evicted: it changes the attention, not
  what is kept.
- **GrowPage** (arXiv:2609.03494): lets the budget grow where attention asks for it; budgets here are numbers that are
  known beforehand.
- **Layer-DefensiveKV** (arXiv:2510.13334): ranks scores of all layers together, which products with the norms of
  different layers do not allow.
- **ThinKV, SkipKV, EpiKV** (arXiv:2510.01290, 2512.07993, 2606.26472): look at the text or at hidden states, or
  change the precision of what stays.
"""


def page() -> str:
    """Return what the page should say."""
    return HEAD + methods_markdown("kvpolicy") + TAIL


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/methods.md is out of date; run python scripts/methods.py")
