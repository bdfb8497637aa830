"""The models of a study: found and checked once, loaded in every process that runs them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from kvpolicy.errors import KVPolicyError, UnreachableError
from kvpolicy.runtimes.opening import check_device, locate, open_model, open_tokenizer, window_of
from kvpolicy.study.source import TextMeasure

_SMALL_BYTES: Final = 200 << 20  # weights up to this size run in float64 on a CPU
_WEIGHTS: Final = ("*.safetensors", "*.bin")
_OTHERS: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # configuration, tokenizer, template, own code
_PART: Final = 1 << 22
_SLOW_BYTES: Final = 4 << 30


@dataclass(frozen=True)
class ModelRef:
    """A model that exists; plain values only, so that it travels to other processes and machines.

    Attributes:
        name: as in the study.
        place: folder, or id on the hub.
        revision: commit on the hub; None for a folder.
        fingerprint: names the content of weights, configuration, tokenizer and chat template, and the dtype, wherever
            the folder is.
        dtype: what the model is loaded as.
        device: where it runs.
        positions: most tokens of a text, answer included, as the configuration says; None if it sets no limit.
    """

    name: str
    place: str
    revision: str | None
    fingerprint: str
    dtype: str
    device: str
    positions: int | None = None


def find_model(name: str, dtype: str, device: str, say: Callable[[str], None] | None = None) -> ModelRef:
    """Find a model and check that it is one.

    Args:
        name: a shipped model's name, a folder, or an id on the hub.
        dtype: as in a study; "auto" is float64 for small models on a CPU, float32 for others there, and what is stored
            on other devices.
        device: as torch names it, or "auto".
        say: called with a sentence when something takes long.

    All weights are read, for their content is part of the key of every run.

    Raises:
        KVPolicyError: it is not there, or is not a model.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    place = locate(name, user="a study", option="models", say=say)
    open_tokenizer(place, name, option="models", say=say)
    if isinstance(place, Path):
        revision, folder = None, place
    else:
        folder = _snapshot(place, name)
        revision = folder.name
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise KVPolicyError(
            f"models: {name!r} has no weights (*.safetensors) in {folder}; give a complete model folder."
        )
    if dtype == "auto":
        small = sum(file.stat().st_size for file in files) <= _SMALL_BYTES
        dtype = "auto" if device != "cpu" else "float64" if small else "float32"
    if say is not None and sum(file.stat().st_size for file in files) > _SLOW_BYTES:
        say(f"models: reading the weights of {name}, whose content is part of what identifies a run.")
    fingerprint = f"{_fingerprint(folder, files)}-{dtype}"
    return ModelRef(name, str(place), revision, fingerprint, dtype, device, window_of(place, revision))


def measure_of(model: ModelRef) -> TextMeasure:
    """Return what problems that are made to a model's measure know of it; raises KVPolicyError."""
    tokenizer = open_tokenizer(model.place, model.name, option="models", revision=model.revision)
    return TextMeasure(tokenizer, model.positions)


def _snapshot(identifier: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(identifier, allow_patterns=patterns))
    except Exception as error:
        raise UnreachableError(
            f"models: {name!r} cannot be fetched from the hub: {' '.join(str(error).split())[:200]}"
        ) from error


def _fingerprint(folder: Path, weights: list[Path]) -> str:
    """Return a hash of all files that a model is made of, each by name and content."""
    others = {file for pattern in _OTHERS for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted({*weights, *others}):
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(_PART):
                content.update(part)
        digest.update(f"{file.name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=1)
def load(model: ModelRef) -> tuple[Any, Any]:
    """Return model and tokenizer; the last one that was asked for stays in memory."""
    tokenizer = open_tokenizer(model.place, model.name, option="models", revision=model.revision)
    loaded = open_model(
        model.place, model.name, dtype=model.dtype, device=model.device, option="models", revision=model.revision
    )
    return loaded, tokenizer


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, as the model's generation config and the tokenizer say."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = set(configured) if isinstance(configured, list | tuple) else {configured}
    found.add(tokenizer.eos_token_id)
    return frozenset(int(token) for token in found if token is not None)
