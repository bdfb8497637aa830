"""Fills in what a policy leaves out, and turns its references into components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvpolicy.contracts.budget import Budget
from kvpolicy.errors import SpecError, UnknownComponentError
from kvpolicy.loading.entries import Catalog
from kvpolicy.spec import files, forms, yaml_text
from kvpolicy.spec.problems import FieldError, Problems
from kvpolicy.spec.reference import ComponentRef, resolve
from kvpolicy.spec.yaml_text import KeyPath

_USUAL: Final = {"redundancy": "none", "allocator": "uniform", "selector": "top_k"}


def resolved_fields(data: Mapping[str, Any], catalog: Catalog, problems: Problems) -> dict[str, Any]:
    """Return the fields of a `PolicySpec` for a canonical mapping.

    Args:
        data: the mapping.
        catalog: knows the names.
        problems: takes what is wrong; fields that are wrong are left out.
    """
    for field in ("policy", "budget", "trigger", "importance"):
        if field not in data and field not in problems.fields:
            problems.found.append(FieldError((field,), f"is missing; every policy says its {field}."))
    fields = {field: value for field, value in data.items() if field not in (*forms.REFERENCES, "protect", "post")}
    if "budget" in data:
        fields["budget"] = Budget(**data["budget"])

    def take(kind: str, reference: Mapping[str, Any], path: KeyPath) -> ComponentRef | None:
        with problems:
            return _resolved(kind, reference, path, catalog)
        return None

    for field in forms.REFERENCES:
        reference = data.get(field)
        if reference is None and field in _USUAL and field not in problems.fields:
            reference = {"use": _USUAL[field]}
        if reference is None and field == "mixer":
            reference = _usual_mixer(data, problems)
        if reference is not None:
            fields[field] = take(field, reference, (field,))
    protect, post = data.get("protect", {}), data.get("post", [])
    fields["protect"] = tuple(
        take("protection", {"use": name, **parameters}, ("protect", name))
        for name, parameters in protect.items()
        if parameters is not False
    )
    fields["post"] = tuple(take("post", item, ("post", i)) for i, item in enumerate(post))
    for field in ("importance", "redundancy"):
        with problems:
            _check_used(field, fields.get(field), fields.get("mixer"))
    wrong = problems.fields
    return {field: value for field, value in fields.items() if field not in wrong}


def _usual_mixer(data: Mapping[str, Any], problems: Problems) -> dict[str, Any] | None:
    if problems.fields & {"mixer", "redundancy"}:  # which one is usual hangs on the redundancy
        problems.leave_out("mixer")
        return None
    redundancy = data.get("redundancy", {"use": "none"}).get("use")
    if redundancy == "none":
        return {"use": "importance_only"}
    with problems:
        raise FieldError(
            ("mixer",),
            f"is missing, and there is no default with redundancy {redundancy!r}; "
            "write for example {use: linear, weight: 0.1}.",
        )
    return None


def _check_used(field: str, scorer: ComponentRef | None, mixer: ComponentRef | None) -> None:
    if scorer is None or mixer is None or scorer.use == "none" or getattr(mixer.component, f"uses_{field}"):
        return
    raise FieldError(
        (field,),
        f"{scorer.use!r} has no effect, for the mixer {mixer.use!r} does not use it; "
        f"write `{field}: none` or a mixer that uses it.",
    )


def _resolved(kind: str, reference: Mapping[str, Any], path: KeyPath, catalog: Catalog) -> ComponentRef:
    try:
        return resolve(kind, reference, path, catalog)
    except FieldError as problem:
        lead = _part_of_policy(kind, reference.get("use"), catalog) if problem.error is UnknownComponentError else ""
        raise FieldError(problem.path, f"{problem.message}{lead}", problem.error, problem.others) from None


def _part_of_policy(kind: str, name: Any, catalog: Catalog) -> str:
    """Say which component a policy has, for those who write the policy's name for it, and where a phase stands."""
    if kind == "trigger" and name in ("prefill", "decode", "both"):
        return f" When compactions may happen is `phase: {name}`, beside a trigger such as `each_step`."
    if name not in catalog.names("policy") or kind not in forms.REFERENCES:
        return ""
    found = files.Found.of_entry(catalog.policy(name))
    try:
        data, _ = files.resolved(yaml_text.parse(found.text, found.source), found, catalog, problems=Problems())
    except (SpecError, FieldError):
        return ""
    use = data.get(kind, {}).get("use")
    return f" The {kind} of the policy {name!r} is {use!r}." if use else ""
