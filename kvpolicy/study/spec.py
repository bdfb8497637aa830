"""StudySpec: what a study file says, checked and complete, as a frozen value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    model_serializer,
)

from kvpolicy.errors import did_you_mean
from kvpolicy.inputs import expanded
from kvpolicy.loading import installed
from kvpolicy.spec import PolicySpec, files, forms, yaml_text
from kvpolicy.spec.model import checked_name
from kvpolicy.spec.problems import FieldError, Problems, from_pydantic, shown
from kvpolicy.spec.yaml_text import KeyPath, Mark
from kvpolicy.study.design import BUDGET, COMPRESS, FULL, POLICY, Axis, Design, Variant, expand
from kvpolicy.study.metrics import DEFAULT_METRICS, METRICS
from kvpolicy.study.problem import Compress
from kvpolicy.study.reading import Reader
from kvpolicy.study.sampling import Sampling
from kvpolicy.study.source import MOST_SAMPLES, Source
from kvpolicy.study.sources import source_data

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]

FIELDS: Final = (
    *("schema_version", "kind", "study", "description", "base", "design", "axes", "conditions", "exclude"),
    *("compare_to", "models", "datasets", "samples", "seeds", "sampling", "compress", "metrics", "batch", "dtype"),
    *("strict", "quick"),
)
"""All fields, in the order in which they are written."""

QUICK_FIELDS: Final = ("axes", "conditions", "datasets", "models", "samples", "seeds", "sampling")

_Tuple = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
_AXES: Final = ("base", "axes", "conditions", "design", "compress")


class StudySpec(BaseModel):
    """A study: the variants of a policy, what they are measured on, and how.

    Raises:
        SpecError: something is wrong; the message names the field, and the file and line if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    """Version of the file format; always 1."""
    kind: Literal["study"] = "study"
    """Always "study"."""
    study: Annotated[str, AfterValidator(checked_name)]
    """Name of the study: at most 64 small letters, digits, dots, dashes and underscores."""
    description: str = ""
    """What is asked, in a sentence."""
    base: InstanceOf[PolicySpec] | None = None
    """The policy that is varied: a name, a path, or a policy written out (also with `extends`)."""
    design: Design = "grid"
    """grid: all combinations of the axes; one-at-a-time: the base, each other value alone; paired: first with first."""
    axes: tuple[InstanceOf[Axis], ...] = ()
    """What is compared: path of the policy specification -> values; the path `policy` takes whole policies."""
    conditions: tuple[InstanceOf[Axis], ...] = ()
    """Circumstances of the comparison, such as `budget`: as axes; every variant meets every combination of them."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations that are left out: mappings from path to value."""
    compare_to: str | None = None
    """The variant that the others are compared with; the first one if left out."""
    models: Annotated[tuple[str, ...], _Tuple] = Field(min_length=1)
    """Shipped models by name, model folders, ids on the hub."""
    datasets: tuple[InstanceOf[Source], ...] = Field(min_length=1)
    """What the models are given."""
    samples: int = Field(default=100, ge=1, le=MOST_SAMPLES)
    """Problems of each dataset and, where seeds give fresh ones, each seed."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], _Tuple] = Field(default=(0,), min_length=1)
    """Seeds of sampling, of random components, and of generated problems."""
    sampling: InstanceOf[Sampling] = Sampling()
    """temperature, top_p, max_new_tokens."""
    compress: Compress | None = None
    """What is compressed to the budget once: context, before the question is seen, or the whole prompt."""
    metrics: Annotated[tuple[str, ...], _Tuple] = DEFAULT_METRICS
    """What is measured."""
    batch: int = Field(default=16, ge=1, le=MOST_SAMPLES)
    """Rows that run together; changes results by rounding at most, in float64 hardly ever."""
    dtype: Dtype = "auto"
    """Numbers of the model; auto is float64 for small models on a CPU, so that a batch cannot change a result."""
    strict: bool = False
    """Whether a variant that is incomplete, ragged or mixed gets no numbers."""
    quick: dict[str, Any] | None = None
    """What `--quick` changes: any of axes, conditions, datasets, models, samples, seeds, sampling."""

    def __init__(self, **fields: Any) -> None:
        try:
            self._fill(fields, {}, None)
        except FieldError as problem:
            raise problem.located() from None

    def _fill(
        self,
        data: dict[str, Any],
        marks: Mapping[KeyPath, Mark],
        found: files.Found | None,
        problems: Problems | None = None,
    ) -> None:
        """Validate into this object; raises FieldError, with all problems of a file."""
        problems, fields = problems or Problems(), {}
        readers = Reader(marks, found).readers
        for field, value in data.items():
            with problems:
                forms.check_field(field, value, FIELDS, problems)
                if value is None and field not in ("base", "compare_to", "compress", "quick"):
                    raise FieldError((field,), "is empty; write a value or remove the line.")
                fields[field] = readers[field](value) if field in readers and value is not None else value
        for field in ("study", "models", "datasets"):
            if field not in data and field not in problems.fields:
                problems.found.append(FieldError((field,), f"is missing; every study says its {field}."))
        try:
            super().__init__(**fields)
        except ValidationError as error:
            known = problems.fields
            more = from_pydantic(error, (), data, "a study", FIELDS)
            problems.found += (problem for problem in more if problem.path[0] not in known)
        wrong = problems.fields
        rest = {field: value for field, value in fields.items() if field not in wrong}
        whole = type(self).model_construct(**rest) if problems.found else self
        for check, needed in (
            (whole._check_axes, _AXES),  # noqa: SLF001
            (whole._check_excluded, ("axes", "conditions", "exclude")),  # noqa: SLF001
            (whole._check_lists, ("models", "seeds", "metrics")),  # noqa: SLF001
            (whole._check_datasets, ("datasets", "seeds", "samples")),  # noqa: SLF001
            (whole._check_given, ("datasets", "models", *_AXES)),  # noqa: SLF001
            (whole._check_compared, (*_AXES, "exclude", "compare_to")),  # noqa: SLF001
        ):
            # Whatever else is wrong; a field that could not be read is not missing.
            if problems.fields.isdisjoint(needed) and all(field in fields for field in needed if field in data):
                with problems:
                    check()
        if self is whole and self.quick is not None:
            try:
                self._quick(marks, found)
            except FieldError as error:  # what the study itself has wrong is not said again
                known = problems.fields
                problems.found += (problem for problem in error if not known & {*problem.path[1:2]})
        problems.check()

    def _check_axes(self) -> None:
        paths = [axis.path for axis in (*self.axes, *self.conditions)]
        for path in paths:
            if paths.count(path) > 1:
                raise FieldError(("conditions", path), "is among the axes too; write it once.")
        if self.compress is not None and COMPRESS in paths:
            raise FieldError((COMPRESS,), "is among the axes or conditions too; write it once.")
        if self.base is None and POLICY not in paths:
            raise FieldError(
                ("base",), "is missing; name the policy that is varied, or whole policies as `axes.policy`."
            )
        if (
            self.base is not None
            and POLICY in paths
            and (self.design != "one-at-a-time" or POLICY not in [a.path for a in self.axes])
        ):
            raise FieldError(("base",), "is not used, because `policy` names whole policies; remove one of the two.")

    def _check_excluded(self) -> None:
        """Check that what is left out could be there: a misspelt path would leave out nothing."""
        paths = [axis.path for axis in (*self.axes, *self.conditions)]
        for i, each in enumerate(self.exclude):
            for path in each:
                if path not in paths:
                    raise FieldError(
                        ("exclude", i, path),
                        f"is no axis or condition.{did_you_mean(str(path), paths)} The study has "
                        f"{', '.join(paths) or 'none'}.",
                    )

    def _check_lists(self) -> None:
        problems = Problems()
        for values, field in ((self.models, "models"), (self.seeds, "seeds"), (self.metrics, "metrics")):
            with problems:
                _check_unique(values, field, "remove one")
        for i, metric in enumerate(self.metrics):
            if metric not in METRICS:
                text = (
                    f"there is no metric {shown(metric)}.{did_you_mean(metric, METRICS)} Known: {', '.join(METRICS)}."
                )
                problems.found.append(FieldError(("metrics", i), text))
        problems.check()

    def _check_datasets(self) -> None:
        _check_unique([source.label for source in self.datasets], "datasets", "give one of them a `name`")
        if any(
            (source.rollouts or len(self.seeds)) * (source.samples or self.samples) > MOST_SAMPLES
            for source in self.datasets
        ):
            text = f"and samples ask for more than {MOST_SAMPLES:,} problems of one dataset; ask for fewer."
            raise FieldError(("seeds",), text)

    def _check_compared(self) -> None:
        names = list(dict.fromkeys((*(variant.name for variant in self.variants()), FULL)))
        if self.compare_to is not None and self.compare_to not in names:
            raise FieldError(
                ("compare_to",),
                f"there is no variant {shown(self.compare_to)}.{did_you_mean(self.compare_to, names)} "
                f"Variants: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}.",
            )

    def _check_given(self) -> None:
        """Check which models are given which datasets."""
        for i, source in enumerate(self.datasets):
            for j, name in enumerate(source.models or ()):
                if name not in self.models:
                    raise FieldError(
                        ("datasets", i, "models", j),
                        f"{shown(name)} is not among the study's models.{did_you_mean(name, self.models)} "
                        f"Models: {', '.join(self.models)}.",
                    )
        for i, source in enumerate(self.datasets):
            for axis in (*self.axes, *self.conditions):
                if source.budget is not None and axis.path.partition(".")[0] == BUDGET:
                    text = f"is said in `{axis.place}` too; write one of the two."
                    raise FieldError(("datasets", i, "budget"), text)
        for i, name in enumerate(self.models):
            if all(source.models is not None and name not in source.models for source in self.datasets):
                raise FieldError(("models", i), f"{shown(name)} is given no dataset; remove it, or give it one.")

    def _quick(self, marks: Mapping[KeyPath, Mark], found: files.Found | None) -> Self:
        """Return the study that `--quick` runs; raises FieldError below ``quick``."""
        assert self.quick is not None
        data, problems = self.to_data(), Problems()
        del data["quick"]
        for field, value in self.quick.items():
            with problems:
                if field not in QUICK_FIELDS:
                    text = (
                        f"cannot be changed here.{did_you_mean(field, QUICK_FIELDS)} Fields: {', '.join(QUICK_FIELDS)}."
                    )
                    raise FieldError((field,), text)
                merged = isinstance(value, Mapping) and isinstance(data[field], dict)
                data[field] = {**data[field], **value} if merged else value
        inner = {path[1:]: mark for path, mark in marks.items() if path[:1] == ("quick",)}
        twin = type(self).__new__(type(self))
        try:
            twin._fill(data, inner, found, problems)  # noqa: SLF001
        except FieldError as problem:
            raise problem.below(("quick",)) from None
        return twin

    # -- reading and writing ------------------------------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, text: str, source: str = "<text>") -> Self:
        """Read a study from YAML text.

        Args:
            text: the content of a study file.
            source: what errors call it; if it is the path of a file, paths in it may be relative to its folder.

        Raises:
            SpecError: ``source:line:column: field: what is wrong``, one sentence.
        """
        return cls._read(files.Found.of_text(text, source))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a study file; raises SpecError as `from_yaml`, also for what is not a text file."""
        path = Path(path)
        return cls._read(files.Found(yaml_text.read_file(path, "study"), str(path), path.parent))

    @classmethod
    def _read(cls, found: files.Found) -> Self:
        document = yaml_text.scan(found.text, found.source, "study")
        spec = cls.__new__(cls)
        try:
            problems = Problems(document.faults)
            with problems:
                files.check_version(document.data)
            _refuse_policy(document.data)
            with problems:
                _check_kind(document.data)
            spec._fill(document.readable, document.marks, found, problems)  # noqa: SLF001
        except FieldError as problem:
            raise problem.located(document.marks) from None
        return spec

    def to_data(self) -> dict[str, Any]:
        """Return plain values, policies in full; `StudySpec(**data)` takes them."""
        data: dict[str, Any] = {}
        for field in FIELDS:
            value = getattr(self, field)
            if isinstance(value, PolicySpec):
                data[field] = value.to_data()
            elif field in ("axes", "conditions"):
                data[field] = {axis.path: axis.data for axis in value}
            elif field == "datasets":
                data[field] = [source_data(source) for source in value]
            elif field == "sampling":
                data[field] = value.model_dump()
            else:
                data[field] = list(value) if isinstance(value, tuple) else value
        return data

    @model_serializer(mode="plain")
    def _serialise(self) -> dict[str, Any]:
        return self.to_data()

    def to_yaml(self) -> str:
        """Return a complete study file; `from_yaml` reads it back to an equal specification."""
        data = {field: value for field, value in self.to_data().items() if value not in (None, "", [], {})}
        return yaml_text.write(data)

    # -- what it means ------------------------------------------------------------------------------------------------

    def variants(self) -> list[Variant]:
        """Return the policies that are measured, condition by condition, in the order of the file."""
        return expand(self.base, self.axes, self.conditions, self.design, self.exclude, self.compress)

    def quickened(self) -> Self:
        """Return what `--quick` runs: the changes of `quick`, or 8 problems and one seed if there are none."""
        if self.quick is not None:
            return self._quick({}, None)
        return type(self)(**{**self.to_data(), "samples": min(self.samples, 8), "seeds": list(self.seeds[:1])})


def find_study(name: str | os.PathLike[str]) -> StudySpec:
    """Return a study by its registered name or the path of its file; raises SpecError."""
    text = os.fspath(name)
    registered = {entry.name: entry for entry in installed.catalog().studies()}
    if isinstance(name, str) and text in registered:
        found = files.Found.of_entry(registered[text])
        return StudySpec._read(found)  # noqa: SLF001
    if not isinstance(name, str) or "/" in text or text.endswith(files.SUFFIXES) or _is_file(text):
        return StudySpec.from_file(expanded(text))
    raise installed.catalog().unknown("study", text, registered)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False


def _refuse_policy(data: Mapping[str, Any]) -> None:
    """Refuse a file of the other kind in one sentence: none of its fields is where it belongs."""
    if "policy" in data and "kind" not in data:
        raise FieldError(("kind",), "is missing; a study file says `kind: study` (this looks like a policy file).")


def _check_kind(data: Mapping[str, Any]) -> None:
    if data.get("kind") != "study":
        what = f"is {shown(data['kind'])}" if "kind" in data else "is missing"
        raise FieldError(("kind",), f"{what}; a study file says `kind: study`.")


def _check_unique(values: Sequence[Any], field: str, mend: str) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise FieldError((field, i), f"{shown(value)} is there twice; {mend}.")
