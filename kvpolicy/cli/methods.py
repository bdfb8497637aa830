"""`kvpolicy list --markdown`: the policies as a table, for the docs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import kvpolicy
from kvpolicy.errors import KVPolicyError
from kvpolicy.loading.entries import same_package
from kvpolicy.policy.policy import Policy
from kvpolicy.spec import ComponentRef, PolicySpec

_HEAD: Final = ("policy", "paper", "parts", "runs", "needs", "memory freed")
_USUAL: Final = {"redundancy": "none", "mixer": "importance_only", "allocator": "uniform", "selector": "top_k"}
_PHASES: Final = {"prefill": "prompt", "decode": "decoding", "both": "prompt and decoding"}


def methods_markdown(package: str | None = None) -> str:
    """Return a table of the registered policies (of one package), and below it what each does otherwise than its paper.

    Raises KVPolicyError when there is none, or one of them is not valid.
    """
    found = kvpolicy.catalog().policies()
    entries = [e for e in found if package is None or same_package(package, e.origin.distribution)]
    if not entries:
        packages = ", ".join(dict.fromkeys(e.origin.distribution for e in found))
        raise KVPolicyError(f"--package: {package!r} registers no policy; write one of {packages}.")
    specs = [kvpolicy.load(entry.name) for entry in entries]
    lines = [_row(_HEAD), _row("---" for _ in _HEAD), *(_row(_cells(spec)) for spec in specs)]
    lines += ["", "## What each does, and where it departs from its paper"]
    for spec in specs:
        lines += ["", f"### {spec.policy}", "", " ".join(spec.description.split()) or "(not described)"]
        if spec.departures:
            lines += ["", *(f"- {' '.join(departure.split())}" for departure in spec.departures)]
    return "\n".join(lines) + "\n"


def _row(cells: Iterator[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") or "–" for cell in cells) + " |"


def _cells(spec: PolicySpec) -> tuple[str, ...]:
    policy = spec.build()
    return (
        f"[{spec.policy}](#{spec.policy.replace('.', '')})",
        spec.paper.removeprefix("arXiv:") and linked(spec.paper),
        "; ".join(_parts(spec)),
        runs(spec),
        ", ".join(f"`{need}`" for need in sorted(policy.needs)),
        freed(policy),
    )


def linked(paper: str) -> str:
    """Return a paper as markdown, with a link where it is one of arXiv."""
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper and " " not in number else paper


def _parts(spec: PolicySpec) -> Iterator[str]:
    """Name every part that is not the usual one."""
    for kind in ("importance", "redundancy", "mixer", "allocator", "selector"):
        ref: ComponentRef = getattr(spec, kind)
        scope = getattr(ref.component, "scope", "head")
        if ref.use != _USUAL.get(kind) or scope != "head":
            shared = f" (one set per {scope})" if scope != "head" else ""
            yield f"{kind} `{_name(ref)}`{shared}"
    if spec.protect:
        yield f"protect {', '.join(f'`{ref.use}`' for ref in spec.protect)}"
    if spec.post:
        yield f"post {', '.join(f'`{_name(ref)}`' for ref in spec.post)}"


def _name(ref: ComponentRef) -> str:
    held = ", ".join(_name(inner) for inner in ref.held.values())
    return f"{ref.use}({held})" if held else ref.use


def runs(spec: PolicySpec) -> str:
    """Return when a policy compacts, in words."""
    if spec.budget.fraction == 1:
        return "never"
    interval = getattr(spec.trigger.component, "interval", None)
    each = f"every {interval}" if interval is not None and interval > 1 else "each token"
    chunk = f", in chunks of {spec.prefill_chunk}" if spec.prefill_chunk is not None else ""
    return _PHASES[spec.phase] + (f", {each}" if spec.phase != "prefill" else "") + chunk


def freed(policy: Policy) -> str:
    """Return whether memory is really freed: for all heads alike, by layer or by head."""
    if policy.budget.fraction == 1:
        return "no, keeps everything"
    return {"equal": "yes", "per_layer": "yes, by layer", "per_head": "yes, by head"}[policy.counts]
