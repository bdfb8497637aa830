"""The calibrations by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.errors import KVPolicyError, UnsupportedError, did_you_mean
from kvpolicy.runtimes.hf.calibration.curves import OBSERVE, best_splits, loss_curves
from kvpolicy.runtimes.hf.calibration.gates import retention_gates, score_gates
from kvpolicy.runtimes.hf.calibration.probes import NEEDLE, copy_probes, copying, streaming_loss
from kvpolicy.runtimes.hf.calibration.statistics import query_filters, query_frequencies
from kvpolicy.runtimes.hf.calibration.watching import check
from kvpolicy.runtimes.hf.model_facts import head_shapes
from kvpolicy.tables import Table

Progress = Callable[[int], object]
"""Called with the number of runs of the model that are still to come."""


@dataclass(frozen=True)
class Settings:
    """What a calibration runs on.

    Attributes:
        length: tokens of one run of the model.
        runs: how many runs at most.
        seed: of what is drawn (the needles of the probes).
    """

    length: int = 640
    runs: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """A calibration.

    Attributes:
        kind: of the table that it makes.
        measure: (model, text tokens, prefix, settings, progress) -> tensors of the table.
        what: what it measures, in a sentence.
        notes: metadata of the table beside that.
    """

    kind: str
    measure: Callable[[PreTrainedModel, Tensor, Tensor, Settings, Progress], Mapping[str, Tensor]]
    what: str
    notes: Mapping[str, str] = field(default_factory=dict)


STREAMING: Final = (4, 64)
"""First and last tokens that a streaming head sees in the calibration of duo-attention."""
HORIZON: Final = 128
"""Later tokens whose attention says what a head loses in the calibration of lu-kv."""


def _counted(items: Iterable[Any], total: int, progress: Progress) -> Iterator[Any]:
    for index, item in enumerate(items):
        progress(total - index)
        yield item
    progress(0)


def _chunks(tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress) -> Iterator[Tensor]:
    size = settings.length - len(prefix)
    parts = tokens[: len(tokens) // size * size].split(size)[: settings.runs]
    return (torch.cat([prefix, part]) for part in _counted(parts, len(parts), progress))


def _headkv(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    probes = copy_probes(tokens, prefix, settings.length, settings.runs, settings.seed)
    found = [copying(model, probe) for probe in _counted(probes, settings.runs, progress)]
    return {"scores": torch.stack(found).mean(0)}


def _duo_attention(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    probes = copy_probes(tokens, prefix, settings.length, settings.runs, settings.seed)
    found = [streaming_loss(model, probe, *STREAMING) for probe in _counted(probes, settings.runs, progress)]
    return {"scores": torch.stack(found).mean(0)}


def _qfilter(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    return query_filters(model, _chunks(tokens, prefix, settings, progress))


def _triattention(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    return query_frequencies(model, _chunks(tokens, prefix, settings, progress))


def _lu_kv(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    return best_splits(loss_curves(model, _chunks(tokens, prefix, settings, progress), HORIZON))


def _kvzap(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    return score_gates(model, _chunks(tokens, prefix, settings, progress), HORIZON)


def _trim_kv(
    model: PreTrainedModel, tokens: Tensor, prefix: Tensor, settings: Settings, progress: Progress
) -> Mapping[str, Tensor]:
    return retention_gates(model, list(_chunks(tokens, prefix, settings, int)), settings.seed, progress)


METHODS: Final[Mapping[str, Method]] = {
    "headkv": Method("head_scores", _headkv, "attention to the tokens that a copy must find again"),
    "duo-attention": Method(
        "head_scores", _duo_attention, "change of the layer's output when a head sees sinks and recent tokens only"
    ),
    "qfilter": Method("query_filters", _qfilter, "the direction that a head's queries share, after RoPE"),
    "triattention": Method("query_frequencies", _triattention, "mean query and magnitude by frequency, before RoPE"),
    "lu-kv": Method("head_curves", _lu_kv, "the split of every budget that loses least of later attention"),
    "kvzap": Method(
        "gates", _kvzap, "a linear gate that predicts the largest later attention to a token", {"output": "score"}
    ),
    "trim-kv": Method(
        "gates",
        _trim_kv,
        "gates with which a model that forgets by the token writes as it does with a full cache",
        {"output": "retention", "activation": "silu"},
    ),
}
"""Calibrations by the name of the method that reads their tables."""


def check_request(method: str, settings: Settings) -> None:
    """Raise KVPolicyError for a method that there is not, and for runs that are too short; a model is not needed."""
    if method not in METHODS:
        raise KVPolicyError(
            f"there is no calibration {method!r}.{did_you_mean(method, METHODS)} Calibrations: {', '.join(METHODS)}."
        )
    least = 4 * NEEDLE + HORIZON + OBSERVE
    if settings.length < least or settings.runs < 1:
        raise KVPolicyError(f"calibrate: at least one run of {least} tokens is needed; raise --length or --runs.")


def calibrate(
    method: str,
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    name: str,
    command: str,
    settings: Settings | None = None,
    progress: Progress = int,
) -> Table:
    """Measure a table on a model.

    Args:
        method: one of `METHODS`.
        model: a decoder whose layers all have full attention, in evaluation mode.
        tokenizer: its tokenizer.
        text: what it reads.
        name: of the model, for people.
        command: what is recorded as the command.
        settings: how much is run.
        progress: called with the number of runs still to come.

    Raises:
        KVPolicyError: there is no such method, or the text is too short.
        UnsupportedError: the model cannot be calibrated.
        TableError: the measurement says nothing.
    """
    settings = settings or Settings()
    check_request(method, settings)
    # Before the text is made tokens, which may take gigabytes.
    layers = check(model)
    shapes = sorted(set(head_shapes(model, range(layers))))
    if len(shapes) > 1:
        raise UnsupportedError(
            f"{type(model).__name__}: its layers have different heads ({shapes[0][0]} of size {shapes[0][1]}, "
            f"{shapes[-1][0]} of size {shapes[-1][1]}), and a table has one shape; calibrate a model whose layers are "
            "alike."
        )
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if len(tokens) < settings.length or len(tokens.unique()) < 2 * NEEDLE:
        raise KVPolicyError(
            f"--text: {len(tokens)} tokens, {len(tokens.unique())} different ones, are too few for runs of "
            f"{settings.length}; give more text or a smaller --length."
        )
    begins = tokenizer("")["input_ids"]  # what the tokenizer puts before every text
    prefix = torch.tensor(begins if begins == [tokenizer.bos_token_id] else [], dtype=torch.int64)
    found = METHODS[method]
    tensors = found.measure(model, tokens, prefix, settings, progress)
    return Table(
        kind=found.kind,
        model=name,
        method=method,
        num_layers=layers,
        num_kv_heads=shapes[0][0],
        head_dim=shapes[0][1],
        tensors=tensors,
        command=command,
        notes={
            **found.notes,
            "measured": found.what,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **{key: str(value) for key, value in asdict(settings).items()},
            **{package: version(package) for package in ("kvpolicy", "transformers", "torch")},
        },
    )
