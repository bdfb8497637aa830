"""What a run's result depends on, and the key that stands for it.

A key is the hash of a document of plain values, which is recorded beside the result. What is in it makes two runs *the
same run*: only then is one of them not repeated, and only then may the other be counted in its place.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from kvpolicy import tables
from kvpolicy.contracts.components import Component
from kvpolicy.errors import KVPolicyError
from kvpolicy.ops.dispatch import BACKEND_VARIABLE
from kvpolicy.spec import PolicySpec, forms
from kvpolicy.spec.reference import ComponentRef
from kvpolicy.study.grading import named
from kvpolicy.study.models import ModelRef
from kvpolicy.study.problem import Compress, Problem
from kvpolicy.study.sampling import Sampling

EPOCH: Final = 3
"""Number of the results that this kvpolicy gives. Another number makes every recorded run count as another one.

It is raised when a change to kvpolicy itself (operations, cache, runtimes, graders, what a metric means) changes what a
run gives. Components need no number: their sources are in the key. tests/study/test_keys.py holds results of this epoch
and fails when they change.
"""

WORDS: Final[Mapping[str, str]] = {
    "epoch": "results of another kvpolicy",
    "kind": "another kind of run",
    "model": "other models",
    "dataset": "other datasets",
    "task": "other tasks",
    "number": "other problems",
    "weights": "other weights, configuration or tokenizer",
    "dtype": "other dtype",
    "device": "other kind of device",
    "backend": "other backend",
    "grader": "other version of the grader",
    "policy": "other policies",
    "code": "other code or tables of components",
    "temperature": "other temperature",
    "top_p": "other top_p",
    "max_new_tokens": "other max_new_tokens",
    "content": "other content of a problem",
    "seed": "other seeds",
    "attention": "with or without attention mass",
    "teacher": "other answer that was read",
    "compress": "other part of the prompt that is compressed",
    "context": "other length of the context",
}
"""The fields of a key's document, and what is said of runs that differ in them; the first one that differs is named."""

Document = Mapping[str, Any]
"""Field -> plain value; the fields are those of `WORDS`, and those that do not apply to a kind of run are left out."""


def key_of(document: Document) -> str:
    """Return the key of a document, 40 hexadecimal digits."""
    return hashlib.sha256(written(document).encode()).hexdigest()[:40]


def written(document: Document) -> str:
    """Return a document as it is hashed and recorded: JSON, keys in order."""
    return json.dumps(dict(document), sort_keys=True, separators=(",", ":"))


def common(
    model: ModelRef,
    problem: Problem,
    seed: int | None,
    policy: PolicySpec,
    digest: str,
    code: str,
    compress: Compress | None = None,
) -> dict[str, Any]:
    """Return what a run of either kind depends on.

    Args:
        model: which model.
        problem: what it is given.
        seed: None if the run does not depend on it.
        policy: the policy.
        digest: names the policy.
        code: of `Codes.of`.
        compress: what is compressed once; None leaves that to the policy.
    """
    part: dict[str, Any] = {} if compress is None else {"compress": compress}
    if compress == "context":
        part["context"] = problem.question_at
    return {
        **part,
        "epoch": EPOCH,
        "model": model.name,
        "weights": model.fingerprint.removesuffix(f"-{model.dtype}"),
        "dtype": model.dtype,
        "device": model.device.partition(":")[0],
        "backend": os.environ.get(BACKEND_VARIABLE, "") if policy.backend == "auto" else "",
        "dataset": problem.dataset,
        "number": problem.index,
        "content": problem.digest,
        "grader": _versions(problem.grader),
        **({"task": problem.task} if problem.task else {}),
        "seed": seed,
        "policy": digest,
        "code": code,
    }


def generated(shared: Document, sampling: Sampling) -> dict[str, Any]:
    """Return the document of a run that generates."""
    return {**shared, "kind": "generate", **sampling.model_dump()}


def forced(shared: Document, teacher: tuple[int, ...], *, attention: bool) -> dict[str, Any]:
    """Return the document of a run that reads."""
    read = hashlib.sha256(json.dumps(list(teacher)).encode()).hexdigest()[:32]
    return {**shared, "kind": "force", "teacher": read, "attention": attention}


class Codes:
    """Hashes of what the policies of one plan are made of; a file is read once."""

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}

    def of(self, policy: PolicySpec) -> str:
        """Return a hash of the sources of a policy's components and of the content of the tables that they name.

        The sources are those of the module of each component's class and of its base classes, and of all modules of
        the same package that these import, so that a helper counts too. kvpolicy itself is left out: `EPOCH` stands
        for it.

        Raises:
            KVPolicyError: a component has no source file: what it does could change without a trace.
        """
        parts = sorted({part for component in _components(policy) for part in self._parts(component)})
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _parts(self, component: Component) -> Iterator[str]:
        for each in type(component).__mro__:
            if issubclass(each, Component) and each.__module__.partition(".")[0] != "kvpolicy":
                yield f"{each.__module__}.{each.__qualname__} {self._sources(_file_of(each))}"
        for table in tables.of_component(component):
            digest = hashlib.sha256(repr((table.kind, table.model, table.method)).encode())
            if table.kind == "gates":  # whose metadata say what is computed
                digest.update(repr((table.notes["output"], table.notes.get("activation"))).encode())
            for name, tensor in sorted(table.tensors.items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
            yield f"table {digest.hexdigest()}"

    def _sources(self, file: Path) -> str:
        if file not in self._files:
            self._files[file] = _hash_of(file)
        return self._files[file]


def _components(policy: PolicySpec) -> Iterator[Component]:
    waiting: list[ComponentRef] = [getattr(policy, field) for field in forms.REFERENCES]
    waiting += [*policy.protect, *policy.post]
    while waiting:
        ref = waiting.pop()
        yield ref.component
        waiting += ref.held.values()


def _file_of(component: type) -> Path:
    try:
        file = inspect.getsourcefile(component)
    except (TypeError, OSError):
        file = None
    if file is None or not Path(file).is_file():
        raise KVPolicyError(
            f"component {component.__qualname__}: has no source file, so a study could not tell when it changes; "
            "put the class into a module."
        )
    return Path(file)


def _hash_of(file: Path) -> str:
    """Return a hash of a file and of the modules of its package that it imports, directly or not."""
    package = _package(file)
    found: dict[Path, bytes] = {}
    waiting = [file]
    while waiting:
        each = waiting.pop()
        if each in found:
            continue
        found[each] = each.read_bytes()
        if package is not None:
            waiting += _imported(each, found[each], package)
    # By name within the package: where it is installed does not matter.
    top = file.parent if package is None else package.parent
    digest = hashlib.sha256()
    for each in sorted(found):
        digest.update(f"{each.relative_to(top).as_posix()} {len(found[each])}\n".encode())
        digest.update(found[each])
    return digest.hexdigest()


def _package(file: Path) -> Path | None:
    """Return the folder of the outermost package that a file is in."""
    folder, found = file.parent, None
    while (folder / "__init__.py").is_file():
        found, folder = folder, folder.parent
    return found


def _imported(file: Path, source: bytes, package: Path) -> list[Path]:
    """Return the files of the modules of a package that a file of it imports, wherever the import stands."""
    here = (package.name, *file.parent.relative_to(package).parts)
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    found = []
    for name in names:
        parts = name.split(".")
        if parts[0] == package.name:
            at = package.joinpath(*parts[1:])
            found += [path for path in (at.with_suffix(".py"), at / "__init__.py") if path.is_file()]
    return found


def _versions(grader: str) -> str:
    """Return the versions of what a grader is made of; one alone without its name."""
    names = named(grader).libraries
    return _version(names[0]) if len(names) == 1 else ", ".join(f"{name} {_version(name)}" for name in names)


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
