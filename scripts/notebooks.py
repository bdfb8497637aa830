"""Executes the notebooks of examples/notebooks in place, so that their outputs are those of the code as it is.

python -P scripts/notebooks.py                     # all of them; needs nbclient, of the extra `dev`
python -P scripts/notebooks.py --check             # only say whether they run
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
MOST_BYTES = 200_000
"""Bytes of a notebook with its outputs; a picture has some tens of thousands."""


def executed(path: Path) -> dict[str, Any]:
    """Run a notebook in a folder of its own and return it with its outputs, without what changes from run to run.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}},
            coalesce_streams=True,
        ).execute()  # fmt: skip
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":
            # Bars and warnings of other libraries are of a run, not of a result.
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr" and not _is_widget(each)]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    found: dict[str, Any] = json.loads(nbformat.writes(notebook))
    return found


def _is_widget(output: Any) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main(argv: Sequence[str] | None = None) -> None:
    """Execute all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks; all of them by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    paths = [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        text = json.dumps(executed(path), indent=1, ensure_ascii=False) + "\n"
        print(f"{path.name}: {len(text):,} bytes")
        if not options.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
