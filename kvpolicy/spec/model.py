"""PolicySpec: what a policy file says, checked and complete, as a frozen value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, Unpack, overload

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

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.errors import BudgetError, SpecError, did_you_mean
from kvpolicy.html_text import facts
from kvpolicy.loading import installed
from kvpolicy.loading.entries import POLICY_NAME
from kvpolicy.ops import dispatch
from kvpolicy.policy.policy import Phase, Policy
from kvpolicy.spec import files, former, forms, yaml_text
from kvpolicy.spec.overrides import KnownOverrides
from kvpolicy.spec.problems import FieldError, Problems, from_pydantic, together
from kvpolicy.spec.reference import ComponentRef
from kvpolicy.spec.resolving import resolved_fields
from kvpolicy.spec.values import check_values


def checked_name(name: str) -> str:
    """Return the name of a policy or study; raises ValueError, for a validator."""
    if not POLICY_NAME.fullmatch(name):
        raise ValueError("should be a name of at most 64 small letters, digits, dots, dashes and underscores")
    return name


def _checked_backend(name: str) -> str:
    known = dispatch.backend_names()
    if name not in known:
        near = did_you_mean(name, known).strip().rstrip("?").replace("Did", "did", 1)
        raise ValueError(f"should be one of {', '.join(known)}{f' ({near}?)' if near else ''}")
    return name


_PARTS: Final = ("budget", "phase", "prefill_chunk", "protect", "post", *forms.REFERENCES)
"""The fields that have to fit together."""

_TOLD: Final = ("trigger", "importance", "redundancy", "mixer")
"""The parts that tell most policies apart, for a line about one."""

_Texts = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class PolicySpec(BaseModel):
    """A policy: its budget, its phase and its components, each with all parameters.

    In Python a component is given as in a file (``"key_norm"``, ``{"use": "linear", "weight": 0.3}``) or as a component
    itself. Two specifications are equal when all fields and all parameters are, however they were written.

    Raises:
        SpecError: something is wrong; the message names the field, and the file and line if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    """Version of the file format; always 1."""
    policy: Annotated[str, AfterValidator(checked_name)]
    """Name of the policy in lists and tables: at most 64 small letters, digits, dots, dashes and underscores."""
    description: str = ""
    """What the policy does, in a sentence."""
    paper: str = ""
    """Where the method comes from, for example "arXiv:2505.24133"."""
    departures: _Texts = ()
    """What differs from the paper, one sentence each."""
    budget: Budget
    """KV entries per KV head and layer after a compaction, protected ones included: `tokens` or `fraction`."""
    phase: Phase = "decode"
    """When compactions may happen: after prefill steps, after decode steps, or both."""
    prefill_chunk: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Tokens per prefill step, counted from the prompt's end; null means the runtime chooses."""
    trigger: InstanceOf[ComponentRef]
    """When a row is compacted."""
    protect: tuple[InstanceOf[ComponentRef], ...] = ()
    """What stays (or goes) whatever its score: name -> true, false, a value or parameters."""
    importance: InstanceOf[ComponentRef]
    """How much each entry matters; higher = keep."""
    redundancy: InstanceOf[ComponentRef]
    """How replaceable each entry is; higher = more replaceable."""
    mixer: InstanceOf[ComponentRef]
    """How importance and redundancy become one score."""
    allocator: InstanceOf[ComponentRef]
    """How the budget is split over layers and KV heads."""
    selector: InstanceOf[ComponentRef]
    """How scores become kept entries."""
    post: tuple[InstanceOf[ComponentRef], ...] = ()
    """Operations on what is kept, in order."""
    backend: Annotated[str, AfterValidator(_checked_backend)] = "auto"
    """Which implementation of the operations to use: auto, torch, triton or a registered one."""

    def __init__(self, **fields: Any) -> None:
        try:
            self._fill(forms.Canonical(fields, installed.catalog()).present().data)
        except FieldError as problem:
            raise problem.located() from None

    def _fill(self, data: dict[str, Any], problems: Problems | None = None) -> None:
        """Validate canonical data into this object; raises FieldError, with all problems of a file."""
        problems = problems or Problems()
        for field, value in data.items():
            with problems:
                check_values(value, (field,))  # also what components that were given as such hold
        fields = resolved_fields(data, installed.catalog(), problems)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            known = problems.fields
            found = from_pydantic(error, (), data, "a policy", forms.FIELDS)
            problems.found += (problem for problem in found if problem.path[0] not in known)
        wrong = problems.fields
        if wrong.isdisjoint(_PARTS):  # whether they fit is known, whatever else is wrong
            rest = {field: value for field, value in fields.items() if field not in wrong}
            whole = type(self).model_construct(**{"policy": "", **rest}) if problems.found else self
            with problems:
                whole._check_fit()  # noqa: SLF001
        problems.check()

    def _check_fit(self) -> None:
        try:
            self.build()
        except (SpecError, BudgetError, ValidationError) as error:
            raise _misfits(error) from None

    @classmethod
    def _from_canonical(cls, data: dict[str, Any], problems: Problems | None = None) -> Self:
        spec = cls.__new__(cls)
        spec._fill(data, problems)  # noqa: SLF001
        return spec

    @classmethod
    def from_yaml(cls, text: str, source: str = "<text>", *, search: files.Search = ()) -> Self:
        """Read a policy from YAML text.

        Args:
            text: the content of a policy file.
            source: what errors call it; if it is the path of a file, `extends` may be relative to its folder.
            search: further folders in which `extends` finds policies by name.

        Raises:
            SpecError: ``source:line:column: field: what is wrong``, one sentence.
        """
        return cls.read_found(files.Found.of_text(text, source), search)

    @classmethod
    def from_file(cls, path: str | Path, *, search: files.Search = ()) -> Self:
        """Read a policy file; raises SpecError as `from_yaml`, also for what is not a text file."""
        return cls.read_found(files.Found.of_path(Path(path)), search)

    @classmethod
    def read_found(cls, found: files.Found, search: files.Search = ()) -> Self:
        """Read what `kvpolicy.spec.files.find` found; raises SpecError as `from_yaml`."""
        return cls.from_document(yaml_text.scan(found.text, found.source), found, search)

    @classmethod
    def from_document(cls, document: yaml_text.Document, found: files.Found, search: files.Search = ()) -> Self:
        """Read a policy that has been parsed; ``found`` is the file that it stands in. Raises as `from_yaml`."""
        try:
            return cls.checked_document(document, found, search)
        except FieldError as problem:
            raise problem.located() from None

    @classmethod
    def checked_document(cls, document: yaml_text.Document, found: files.Found, search: files.Search = ()) -> Self:
        """Do what `from_document` does, for a caller that has more to find: raises FieldError with its places."""
        problems, marks = Problems(document.faults), document.marks
        try:
            data, placed = files.resolved(document, found, installed.catalog(), search, problems=problems)
            marks = {**marks, **_through_extends(marks, placed)}
            return cls._from_canonical(data, problems)
        except FieldError as problem:
            raise problem.placed(marks) from None

    def __repr__(self) -> str:
        budget = self.budget.model_dump(exclude_none=True)
        parts = (f"{field}={getattr(self, field)}" for field in forms.REFERENCES if field in _TOLD)
        return f"PolicySpec({self.policy!r}, budget={budget}, phase={self.phase!r}, {', '.join(parts)})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        fields = ("budget", "phase", *forms.REFERENCES, "protect", "post")
        data = self.to_data()
        told = {**data, **{field: getattr(self, field) for field in forms.REFERENCES}}
        told |= {field: ", ".join(map(str, getattr(self, field))) for field in ("protect", "post")}
        about = [(name, told[name]) for name in ("description", "paper") if told[name]]
        return facts(
            f"Policy file: {self.policy}", [*about, *((field, told[field]) for field in fields if told[field])]
        )

    def to_data(self) -> dict[str, Any]:
        """Return plain values, every component with all its parameters; `PolicySpec(**data)` takes them."""
        data: dict[str, Any] = {}
        for field in forms.FIELDS:
            value = getattr(self, field)
            if isinstance(value, ComponentRef):
                data[field] = value.data
            elif isinstance(value, Budget):
                data[field] = value.model_dump(exclude_none=True)
            elif field == "protect":
                data[field] = {ref.use: ref.params for ref in self.protect}
            elif field == "post":
                data[field] = [ref.data for ref in self.post]
            else:
                data[field] = list(value) if isinstance(value, tuple) else value
        return data

    @model_serializer(mode="plain")
    def _serialise(self) -> dict[str, Any]:
        return self.to_data()

    def to_yaml(self) -> str:
        """Return a complete policy file without `extends`; `from_yaml` reads it back to an equal specification."""
        data = self.to_data()
        for field in ("description", "paper", "departures", "prefill_chunk", "protect", "post"):
            if not data[field]:
                del data[field]
        data |= {field: _short(getattr(self, field)) for field in forms.REFERENCES}
        if self.protect:
            data["protect"] = {ref.use: _protection(ref) for ref in self.protect}
        if self.post:
            data["post"] = [_short(ref) for ref in self.post]
        return yaml_text.write(data)

    def replace(self, path: str | Mapping[str, Any], value: Any = None) -> Self:
        """Return a copy with some fields or parameters changed, checked as a whole.

        Args:
            path: a dotted path such as ``mixer.weight``, ``budget.tokens``, ``protect.recent`` or ``importance.use``,
                or a mapping from such paths to values, laid over in order. Another `use` drops the old parameters;
                another `policy` drops description, paper and departures, as `extends` does.
            value: the new value, as in a file; only with a single path.

        Raises:
            SpecError: there is no such field or parameter, or the result is not valid.
        """
        changes = path if isinstance(path, Mapping) else {path: value}
        data, problems = self.to_data(), Problems()
        try:
            for where, new in changes.items():
                with problems:
                    data = _changed(data, where, new)
            if data.get("policy") != self.policy:  # another policy says of itself only what it is told
                data = {field: value for field, value in data.items() if field not in {*files.OWN} - {*changes}}
            return self._from_canonical(data, problems)
        except FieldError as problem:
            raise problem.located() from None

    def build(self) -> Policy:
        """Return the policy that runtimes run."""
        parts: dict[str, Any] = {field: getattr(self, field).component for field in forms.REFERENCES}
        return Policy(
            name=self.policy,
            budget=self.budget,
            protections=tuple(ref.component for ref in self.protect),  # type: ignore[misc]
            post=tuple(ref.component for ref in self.post),  # type: ignore[misc]
            phase=self.phase,
            prefill_chunk=self.prefill_chunk,
            backend=self.backend,
            paper=self.paper,
            departures=self.departures,
            description=self.description,
            **parts,
        )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy; with `update`, check the result as `replace` does."""
        return super().model_copy(deep=deep) if not update else type(self)(**{**dict(self), **update})


@overload
def load(
    name_or_path: str | os.PathLike[str],
    budget: float | Mapping[str, Any] | None = None,
    *,
    search: files.Search = (),
    **overrides: Unpack[KnownOverrides],
) -> PolicySpec: ...
@overload
def load(
    name_or_path: str | os.PathLike[str],
    budget: float | Mapping[str, Any] | None = None,
    *,
    search: files.Search = (),
    **overrides: Any,
) -> PolicySpec: ...
def load(
    name_or_path: str | os.PathLike[str],
    budget: float | Mapping[str, Any] | None = None,
    *,
    search: files.Search = (),
    **overrides: Any,
) -> PolicySpec:
    """Return a policy by name or path, with changes.

    Args:
        name_or_path: a registered name, the path of a policy file, or the name of a file in one of the `search`
            folders or in those of the environment variable KVPOLICY_POLICY_PATH; looked for in this order.
        budget: KV entries per head (an integer), a share of the tokens seen (a number up to 1.0), or
            ``{"tokens": 512}`` / ``{"fraction": 0.1}``; what the file says if None.
        search: one or more folders.
        overrides: fields and parameters, with two underscores for the dot: ``mixer__weight=0.3, phase="both"``.

    Raises:
        UnknownComponentError: nothing has that name.
        SpecError: the file or an override is not valid.
    """
    found = files.find(name_or_path, installed.catalog(), search)
    spec = PolicySpec.read_found(found, search)
    changes = {path.replace("__", "."): value for path, value in overrides.items()}
    if budget is not None:
        changes = {"budget": budget, **changes}
    return spec.replace(changes) if changes else spec


def _changed(data: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    parts, overlay = forms.nested(where, value)
    parts[0] = former.FIELDS.get(parts[0], parts[0])
    if parts[0] not in forms.FIELDS:
        if parts[0] in forms.HABITS:
            instead = forms.HABITS[parts[0]](value)
        else:
            instead = f"{did_you_mean(parts[0], forms.FIELDS)} Fields: {', '.join(forms.FIELDS)}.".strip()
        raise FieldError(tuple(parts), f"there is no field {parts[0]!r}. {instead}")
    catalog = installed.catalog()
    canonical = forms.Canonical(overlay, catalog, beneath=data).present(data).data
    merged, _ = forms.merge(_without(data, parts), canonical, {}, {})
    return forms.unfold(merged, catalog)


def _without(data: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    """Leave out what a path names as a whole: a field, a protection or a component; parameters are laid over."""
    name, *rest = parts
    if not isinstance(data.get(name), Mapping):
        return dict(data)
    if rest:
        return {**data, name: _without(data[name], rest)}
    return {key: value for key, value in data.items() if key != name}


def _short(ref: ComponentRef) -> Any:
    """Return a component as a file says it: its name, or `use` and its parameters."""
    params = _short_parameters(ref)
    return {"use": ref.use, **params} if params else ref.use


def _short_parameters(ref: ComponentRef) -> dict[str, Any]:
    return {**ref.params, **{name: _short(held) for name, held in ref.held.items()}}


def _protection(ref: ComponentRef) -> Any:
    """Return a protection as a file says it: a bare value, true or its parameters."""
    params = _short_parameters(ref)
    shorthand = ref.component.shorthand
    if shorthand is not None and list(params) == [shorthand] and not isinstance(params[shorthand], bool | dict | None):
        return params[shorthand]
    return params or True


def _through_extends(marks: forms.Marks, placed: forms.Marks) -> forms.Marks:
    """Let places in a base begin with where it is extended: what is wrong there may be fine in the base by itself."""
    here = marks.get(("extends",))
    return {
        path: mark._replace(source=f"{here}: {mark.source}") if here and mark.source != here.source else mark
        for path, mark in placed.items()
    }


def _misfits(error: SpecError | BudgetError | ValidationError) -> FieldError:
    """Find the fields that the sentences of `Policy` begin with."""
    if isinstance(error, ValidationError):
        messages = [str(detail["msg"]) for detail in error.errors()]
    else:
        messages = list(error.problems) if isinstance(error, SpecError) else [str(error)]
    return together([_misfit(message) for message in messages])


def _misfit(message: str) -> FieldError:
    head = re.match(r"([a-z_]+)((?:\.[a-z0-9_]+)*): ", message)
    if head is None or head[1] not in forms.FIELDS:
        return FieldError((), message)
    return FieldError((head[1], *head[2].split(".")[1:]), message[head.end() :])
