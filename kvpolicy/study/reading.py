"""Turns the values of a study file into what `StudySpec` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from kvpolicy.errors import SpecError
from kvpolicy.loading import installed
from kvpolicy.spec import PolicySpec, files
from kvpolicy.spec.problems import FieldError, Problems, from_pydantic, shown
from kvpolicy.spec.yaml_text import Document, KeyPath, Mark
from kvpolicy.study.design import BUDGET, COMPRESS, POLICY, Axis, read_trace
from kvpolicy.study.problem import Compress
from kvpolicy.study.sampling import Sampling
from kvpolicy.study.source import Source
from kvpolicy.study.sources import read_source


class Reader:
    """Reads the fields that need more than pydantic; every method raises FieldError.

    Args:
        marks: where values stand; empty for values that come from Python.
        found: the file that they stand in.
    """

    def __init__(self, marks: Mapping[KeyPath, Mark], found: files.Found | None) -> None:
        self.marks = marks
        self.found = found
        self.readers = {
            "base": lambda value: self.policy(value, ("base",)),
            "axes": lambda value: self.axes(value, "axes"),
            "conditions": lambda value: self.axes(value, "conditions"),
            "exclude": self.exclude,
            "datasets": self.datasets,
            "sampling": self.sampling,
            "models": self.models,
        }

    def policy(self, value: Any, path: KeyPath) -> PolicySpec:
        """Return the policy that a name, a path or a mapping stands for."""
        if isinstance(value, PolicySpec):
            return value
        folder = None if self.found is None else self.found.folder
        if isinstance(value, str):
            try:
                return PolicySpec.read_found(files.find(value, installed.catalog(), (), folder))
            except SpecError as error:
                raise FieldError(path, str(error), type(error)) from None
        if not isinstance(value, Mapping):
            raise FieldError(path, f"should be the name or path of a policy, or a policy, got {shown(value)}.")
        name = value.get("extends", "inline")
        data = {"schema_version": 1, "policy": Path(name).stem if isinstance(name, str) else "inline", **value}
        here = {p[len(path) :]: mark for p, mark in self.marks.items() if p[: len(path)] == path}
        found = files.Found("", "<study>") if self.found is None else replace(self.found, registered=None)
        try:
            return PolicySpec.checked_document(Document(data, here), found)
        except FieldError as problem:
            if here:  # it has its place already
                raise
            located = problem.located()
            raise FieldError(path, str(located), type(located)) from None

    def axes(self, value: Any, place: Literal["axes", "conditions"]) -> tuple[Axis, ...]:
        """Return the axes of a mapping from paths to lists of values."""
        if isinstance(value, tuple) and all(isinstance(axis, Axis) for axis in value):
            return value
        if not isinstance(value, Mapping):
            raise FieldError((place,), f"should be a mapping such as {{mixer.weight: [0.1, 0.3]}}, got {shown(value)}.")
        problems, axes = Problems(), []
        for path, values in value.items():
            with problems:
                axes.append(self._axis(path, values, place))
        problems.check()
        return tuple(axes)

    def _axis(self, path: str, values: Any, place: Literal["axes", "conditions"]) -> Axis:
        at: KeyPath = (place, path)
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
            raise FieldError(at, f"should be a list of values, got {shown(values)}.")
        if not values:
            raise FieldError(at, "has no value; write at least one, or remove the axis.")
        read: list[Any] = []
        problems = Problems()
        for i, value in enumerate(values):
            with problems:
                if path == POLICY:
                    read.append(self.policy(value, (*at, i)))
                elif path == BUDGET and isinstance(value, Mapping) and "trace" in value:
                    read.append(read_trace(value, (*at, i)))
                elif path == COMPRESS and value not in get_args(Compress):
                    raise FieldError((*at, i), f"should be one of {', '.join(get_args(Compress))}, got {shown(value)}.")
                else:
                    read.append(value)
                if read[-1] in read[:-1]:
                    raise FieldError((*at, i), f"{shown(value)} is there twice; remove one.")
        problems.check()
        return Axis(path, tuple(read), place)

    def exclude(self, value: Any) -> tuple[dict[str, Any], ...]:
        """Return the combinations that are left out."""
        if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping) and each for each in value):
            raise FieldError(("exclude",), f"should be a list of mappings from path to value, got {shown(value)}.")
        return tuple(dict(each) for each in value)

    def datasets(self, value: Any) -> tuple[Source, ...]:
        """Return the sources of problems."""
        folder = None if self.found is None else self.found.folder
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            raise FieldError(("datasets",), f"should be a list, got {shown(value)}.")
        problems, sources = Problems(), []
        for i, each in enumerate(value):
            with problems:
                sources.append(read_source(each, ("datasets", i), folder))
        problems.check()
        return tuple(sources)

    def models(self, value: Any) -> Any:
        """Return the models; folders that begin with a dot are relative to the study file."""
        folder = None if self.found is None else self.found.folder
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise FieldError(("models",), f"should be a list of names or folders, got {shown(value)}.")
        is_relative = [isinstance(each, str) and each.startswith(".") for each in value]
        return tuple(
            str(folder / each) if folder is not None and relative else each
            for each, relative in zip(value, is_relative, strict=True)
        )

    def sampling(self, value: Any) -> Sampling:
        """Return how tokens are chosen."""
        if isinstance(value, Sampling):
            return value
        if not isinstance(value, Mapping):
            raise FieldError(("sampling",), f"should be a mapping such as {{max_new_tokens: 512}}, got {shown(value)}.")
        try:
            return Sampling(**value)
        except ValidationError as error:
            raise from_pydantic(error, ("sampling",), value, "sampling", Sampling.model_fields) from None
