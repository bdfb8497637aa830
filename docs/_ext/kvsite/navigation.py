"""The order of the pages, in the sidebar and in llms.txt."""

from __future__ import annotations

from pathlib import Path

SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("quick-start", "concepts", "faq", "glossary"),
    "Use": (
        "write-a-policy",
        "spec",
        "transformers",
        "context",
        "studies",
        "results/README",
        "trace",
        "serving",
        "plan",
        "tables",
        "bridges",
    ),
    "Extend": ("write-a-plugin", "write-a-kernel", "laws", "mutations"),
    "Move over": ("from-kvpress", "from-rkv", "kvpress"),
    "Speed": ("performance", "benchmarks", "kernels", "gpu"),
    "Reference": (
        "methods",
        "reference/policies/index",
        "reference/components/index",
        "reference/commands",
        "reference/api/index",
        "models",
        "vllm-policies",
        "vllm-versions",
    ),
    "Project": ("architecture", "development", "reference/files/index"),
}


def toctrees() -> str:
    """Return the hidden tables of contents that stand at the end of the first page."""
    parts = []
    for caption, pages in SECTIONS.items():
        parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n" + "\n\n".join(parts) + "\n"


def results(folder: Path) -> str:
    """Return a list of all published studies, which stands at the end of the page of results."""
    names = sorted(path.stem for path in folder.glob("*.md") if path.stem != "README")
    return "\n\n## All tables\n\n" + "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```"]) + "\n"
