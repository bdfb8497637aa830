"""Breaks components and the core on purpose, and writes which law catches what into docs/.

python -P scripts/mutate.py           # docs/mutations.md and docs/laws.md; exit code 1 if a mutant is not caught
python -P scripts/mutate.py --laws    # docs/laws.md only
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(_ROOT / "tests/support"))

from kvsupport import documents
from kvsupport.mutants import Caught, table

_DOCS = _ROOT / "docs"


def main() -> int:
    """Write the pages."""
    documents.write(_DOCS / "laws.md", documents.laws_text())
    if "--laws" in sys.argv[1:]:
        return 0

    def done(row: Caught) -> None:
        print(f"{row.kind}: {row.mutant.name}: {', '.join(row.laws) or 'NOT CAUGHT'}", flush=True)

    rows = table(done)
    documents.write(_DOCS / "mutations.md", documents.mutations_text(rows))
    missed = [row for row in rows if not row.laws]
    print(f"{len(rows)} mutants, {len(missed)} not caught.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
