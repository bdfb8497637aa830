"""A page for each bundled policy."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import kvpolicy
from kvpolicy import Policy, PolicySpec
from kvpolicy.cli.explaining import words
from kvpolicy.cli.listing import first_sentence
from kvpolicy.cli.methods import freed, linked, runs
from kvpolicy.cli.showing import parameter_rows
from kvpolicy.contracts.components import NEEDS
from kvpolicy.runtimes.vllm.refusals import policy_refusal
from kvpolicy.spec import ComponentRef, files, yaml_text
from kvpolicy.testing.tables import stand_in_tables, table_fields
from kvsite.components import anchor
from kvsite.markdown import code, table, text, tree

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
KINDS = ("importance", "redundancy", "mixer", "allocator", "selector")
MODELS = {
    "rope": "models with a rotary embedding (not GPT-2, OPT, BERT and their like)",
    "weights": "models whose attention ends in one output projection",
    "modality": "vision-language models, where text and image are to be told apart",
}
"""What a need asks of a model; every served model has queries, attention and statistics of queries."""


def pages(root: Path) -> dict[str, str]:
    """Return path and text of all pages; `root` is the folder of the hand-written ones."""
    specs = [kvpolicy.load(entry.name) for entry in kvpolicy.catalog().policies()]
    kernels = _kernels_of_all([spec.policy for spec in specs], root.parent / "build" / "docs-kernels.json")
    made = {f"reference/policies/{spec.policy}.md": _page(spec, kernels[spec.policy]) for spec in specs}
    rows = [
        (f"[{spec.policy}]({spec.policy}.md)", runs(spec), text(first_sentence(spec.description))) for spec in specs
    ]
    made["reference/policies/index.md"] = (
        "# Policies\n\nEvery policy that comes with kvpolicy, one page each, made from its file and the code. "
        "[Methods](../../methods.md) has them in one table with their parts, papers and departures.\n\n"
        f"{table(('policy', 'runs', 'what it is'), rows)}\n\n{tree(spec.policy for spec in specs)}"
    )
    return made


def _page(spec: PolicySpec, kernels: str) -> str:
    with stand_in_tables():
        policy = spec.build()
        served = _served(policy)
    parts = [
        f"# {spec.policy}",
        text(spec.description),
        table(("policy", code(spec.policy)), _facts(spec, policy, served, kernels)),
    ]
    if spec.departures:
        parts += ["## Departures from the paper", "\n".join(f"- {text(each)}" for each in spec.departures)]
    parts += [
        "## In words",
        table(("part", "what it does here"), _in_words(spec, policy)),
    ]
    parts += ["## Parameters", _parameters(spec)]
    parts += ["## The file", _file(spec)]
    parts += ["In full, with every parameter:", f"```yaml\n{_short(spec)}```"]
    parts += ["## Use it", use(spec, policy, served=served == "served")]
    return "\n\n".join(parts) + "\n"


def _in_words(spec: PolicySpec, policy: Policy) -> list[tuple[str, str]]:
    """Return a row for each part; what a terminal says in further lines without a label belongs to the one before."""
    rows: list[tuple[str, str]] = []
    for label, said in words(spec, policy):
        if label or not rows:
            rows.append((label, text(said)))
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {text(said)}")
    return rows


def _facts(spec: PolicySpec, policy: Policy, served: str, kernels: str) -> list[tuple[str, str]]:
    needs = "; ".join(f"`{need}`: {text(NEEDS[need])}" for need in sorted(policy.needs))
    models = [MODELS[need] for need in sorted(policy.needs) if need in MODELS]
    tables = sorted({str(getattr(part, name)) for part in policy.components for name in table_fields(type(part))})
    if tables:
        models.append(f"the model that the [table](../../tables.md) `{'`, `'.join(tables)}` was measured on")
    on = "all that are [served](../../models.md)" if not models else "; ".join(models)
    facts = [
        ("paper", linked(spec.paper)),
        ("runs", runs(spec)),
        ("memory freed", freed(policy)),
        ("needs", needs or "keys, values and positions only"),
        ("models", on),
        ("vLLM", served),
        ("kernels", kernels),
    ]
    return [(f"**{name}**", said) for name, said in facts if said]


def _served(policy: Policy) -> str:
    why = policy_refusal(policy)
    return "served" if why is None else f"refused: {why.removeprefix(f'policy {policy.name!r} ')}"


@cache
def _kernel_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_table_of_docs", SCRIPTS / "kernel_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _fingerprint() -> str:
    """Return a hash of all code and policies that decide which kernels run."""
    root = SCRIPTS.parent
    digest = hashlib.sha256()
    for folder in ("kvpolicy", "plugins", "kernels", "registry"):
        for path in sorted([*(root / folder).rglob("*.py"), *(root / folder).rglob("*.yaml")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _kernels_of_all(names: list[str], kept: Path) -> dict[str, str]:
    """Return what is said of kernels for each policy; each is tried on a tiny model, unless nothing has changed."""
    print_of = _fingerprint()
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["of"] == print_of:
            return dict(found["said"])
    said = {name: _kernels(name) for name in names}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"of": print_of, "said": said}), encoding="utf-8")
    return said


def _kernels(name: str) -> str:
    """Say which operations have a Triton kernel on a model like Llama 3, and what is left to torch."""
    calls = _kernel_table()
    try:
        asked = calls.calls_of(name)
    except kvpolicy.KVPolicyError:
        return ""
    family = calls.FAMILIES[0]
    said: dict[bool, set[str]] = {True: set(), False: set()}
    for key, call in asked.items():
        said[calls.reason(call, family) is None].add(call.get("op", key.partition(" ")[0]))
    left = said[False]
    listed = {has: ", ".join(code(op) for op in sorted(ops)) for has, ops in said.items()}
    words = [f"{listed[True]} have a [Triton kernel](../../kernels.md)"] if said[True] else []
    words += [f"{listed[False]} are torch's"] if left else []
    return f"{'; '.join(words)}; all else is plain torch" if words else "none: nothing is compacted"


def _parts(spec: PolicySpec) -> list[tuple[str, ComponentRef]]:
    parts = [("trigger", spec.trigger), *(("protection", ref) for ref in spec.protect)]
    return [*parts, *((kind, getattr(spec, kind)) for kind in KINDS), *(("post", ref) for ref in spec.post)]


def _parameters(spec: PolicySpec) -> str:
    rows = []
    for kind, ref in _parts(spec):
        rows.append((f"**{kind}**", f"[`{ref.use}`](../components/{kind}.md#{anchor(ref.use)})", "", ""))
        for name, value, allowed, meaning in parameter_rows(ref):
            depth = (len(name) - len(name.lstrip())) // 2
            rows.append(("· " * (depth - 1) + code(name.strip()), code(str(value)), code(allowed), text(meaning)))
    return table(("part", "value", "allowed", "meaning"), rows)


def _file(spec: PolicySpec) -> str:
    found = files.find(spec.policy, kvpolicy.catalog())
    base = yaml_text.parse(found.text, found.source).data.get("extends")
    said = f"It extends [{base}]({base}.md)." if base is not None else "It stands alone."
    kept = [line for line in found.text.splitlines() if line.strip()]
    return f"{said}\n\n```yaml\n" + "\n".join(kept) + "\n```"


def _short(spec: PolicySpec) -> str:
    return spec.model_copy(update={"description": "", "departures": (), "paper": ""}).to_yaml()


def use(spec: PolicySpec, policy: Policy, *, served: bool) -> str:
    """Return how a policy is loaded, tried and served."""
    budget = "" if policy.budget.fraction == 1 else (", budget=0.3" if policy.phase == "prefill" else ", budget=512")
    option = budget.replace(", budget=", " --budget ")
    lines = [f"```python\nspec = kvpolicy.load({spec.policy!r}{budget})\n```".replace("'", '"')]
    lines += [f'```\nkvpolicy generate --model smollm2 --policy {spec.policy}{option} --compare full "…"\n```']
    lines += ["[In transformers](../../transformers.md)" + ("; [in vLLM](../../serving.md)." if served else ".")]
    return "\n\n".join(lines)
