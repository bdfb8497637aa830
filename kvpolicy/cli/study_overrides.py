"""Options of `kvpolicy study plan` and `run` that replace what a study's file says: its models, data sets and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.errors import KVPolicyError, did_you_mean

if TYPE_CHECKING:
    from kvpolicy.study.spec import StudySpec

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="MODEL", help="In place of the study's models: a name, a folder, an id on the hub."
    ),
]
Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", metavar="NAME", help="Of the study's datasets only this one.")
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=PATH", help="Read a dataset from a local copy in its published format."),
]
Samples = Annotated[int | None, typer.Option(min=1, metavar="N", help="Problems of each dataset.")]
Seeds = Annotated[int | None, typer.Option(min=1, metavar="N", help="So many seeds, or rollouts: 0, 1, ...")]
NewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of each answer.")
]


@dataclass(frozen=True)
class Overrides:
    """What the options say; None or empty leaves it to the study."""

    models: list[str] | None = None
    datasets: list[str] | None = None
    data: list[str] | None = None
    samples: int | None = None
    seeds: int | None = None
    max_new_tokens: int | None = None

    def applied(self, spec: StudySpec) -> StudySpec:
        """Return the study with what the options replace; the same one if there are none.

        Raises:
            KVPolicyError: a dataset is not among the study's, or has no local copy.
            SpecError: what comes out is no study.
        """
        if self == Overrides():
            return spec
        labels = [source.label for source in spec.datasets]
        for name in self.datasets or ():
            _require_known("--dataset", name, labels)
        copies = dict(self._copy(each, spec, labels) for each in self.data or ())
        fields: dict[str, Any] = {**spec.to_data(), "quick": None}
        fields["datasets"] = [
            # A path would change what tables call it.
            self._entry({"name": name, **entry, **copies.get(name, {})})
            for name, entry in zip(labels, fields["datasets"], strict=True)
            if not self.datasets or name in self.datasets
        ]
        if self.models:
            fields["models"] = self.models
        if self.samples is not None:
            fields["samples"] = self.samples
        if self.seeds is not None:
            fields["seeds"] = list(range(self.seeds))
        if self.max_new_tokens is not None:
            fields["sampling"] = {**fields["sampling"], "max_new_tokens": self.max_new_tokens}
        return type(spec)(**fields)

    def _copy(self, given: str, spec: StudySpec, labels: list[str]) -> tuple[str, dict[str, str]]:
        name, equals, path = given.partition("=")
        _require_known("--data", name, labels)
        if not equals or not path:
            raise KVPolicyError(f"--data: {given!r} names no file; write {name}=PATH.")
        if "path" not in type(spec.datasets[labels.index(name)]).model_fields:
            raise KVPolicyError(f"--data: {name} is read from no file; leave it out.")
        return name, {"path": str(Path(path).absolute())}

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        replaced = {"models": self.models, "samples": self.samples, "rollouts": self.seeds}
        kept = {field: value for field, value in entry.items() if replaced.get(field) is None}
        return kept if self.max_new_tokens is None else {**kept, "max_new_tokens": self.max_new_tokens}


def _require_known(option: str, name: str, labels: list[str]) -> None:
    if name not in labels:
        raise KVPolicyError(
            f"{option}: the study has no dataset {name!r}.{did_you_mean(name, labels)} Its datasets: "
            f"{', '.join(labels)}."
        )
