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


def page() -> str:
    """Return what the page should say."""
    return HEAD + methods_markdown("kvpolicy")


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/methods.md is out of date; run python scripts/methods.py")
