"""What a model takes besides the entries that a policy works on: weights, windows and states, and what a step costs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvpolicy.cli.built import built
from kvpolicy.cli.memory import DTYPES, folder_of, for_transformers
from kvpolicy.errors import KVPolicyError
from kvpolicy.inputs import read_text

_UNITS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LARGEST: Final = 1 << 50
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


@dataclass(frozen=True)
class ModelSize:
    """What a decode step must read and compute for a model, besides the keys and values of a policy's layers.

    Attributes:
        weights: bytes.
        parameters: how many; 0 where nobody knows, and then no arithmetic is counted.
        expert_share: of the parameters, those in experts.
        chosen: of the experts, the share that one token goes through.
        state: bytes per row of windows and states that no policy touches; None where they are not known.
        query_heads: of a layer; 0 where they are not known.
        longest: tokens that the model reads at most; None where it does not say.
    """

    weights: int
    parameters: int = 0
    expert_share: float = 0.0
    chosen: float = 1.0
    state: int | None = 0
    query_heads: int = 0
    longest: int | None = None

    def read(self, rows: int) -> float:
        """Return the bytes of weights that a step of so many rows reads: of experts those that some row chooses."""
        untouched = self.expert_share * (1 - self.chosen) ** rows
        return self.weights * (1 - untouched)

    @property
    def products(self) -> float:
        """Floating-point operations of a token's matrix products with the weights."""
        return 2 * self.parameters * (1 - self.expert_share * (1 - self.chosen))

    def split(self, ranks: int) -> ModelSize:
        """Return what one rank of tensor parallelism has, every weight and state taken to be split."""
        return replace(
            self, weights=self.weights // ranks, parameters=self.parameters // ranks,
            state=None if self.state is None else -(-self.state // ranks), query_heads=self.query_heads // ranks,
        )  # fmt: skip


EXAMPLE: Final = ModelSize(2 * 8_190_735_360, 8_190_735_360, query_heads=32, longest=40_960)
"""Qwen3-8B in bf16, for which `explain` and `plan` speak when no model is named."""


def bytes_of(text: str, option: str) -> int:
    """Return what a size says, ``24GiB``, ``80 GB``, ``512MiB`` or a number of bytes; raises KVPolicyError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    number = 0
    if match is not None and (match[2] or not match[3]):
        number = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]])
    if not 1 <= number <= _LARGEST:
        raise KVPolicyError(f"{option}: {text[:40]!r} is not a size; write 24GiB (1024^3) or 80GB (1000^3).")
    return number


def size_from_config(place: str, text: Mapping[str, Any], dtype: str, weights: int | None) -> ModelSize:
    """Count a model's weights, and what a row keeps besides what a policy works on.

    Args:
        place: as `kvpolicy.cli.memory.read_config` takes it.
        text: what that returned.
        dtype: of weights and cache.
        weights: bytes of the weights, where they are given.

    Raises:
        KVPolicyError: nobody says how large the weights are.
    """
    found = built(for_transformers(place), dtype)
    quantised = bool(text.get("quantization_config"))
    if weights is None and quantised:
        weights = _stored(folder_of(place))
    if weights is None and (quantised or found is None):
        why = (
            f"{place} is quantised and holds no weights to look at"
            if quantised
            else f"transformers knows no model like {place}, so that its parameters cannot be counted"
        )
        raise KVPolicyError(f"--weights: {why}; say how many bytes its weights have, as in 5GB.")
    experts, chosen = _number(text, _EXPERTS), _number(text, _CHOSEN)
    known = 0 < chosen <= experts
    share = found.expert_parameters / max(found.parameters, 1) if found is not None and known else 0.0
    parameters = 0 if found is None else found.parameters
    return ModelSize(
        weights=parameters * DTYPES[dtype][1] if weights is None else weights,
        parameters=parameters,
        expert_share=share,
        chosen=chosen / experts if known else 1.0,
        state=None if found is None else found.state,
        query_heads=_number(text, ("num_attention_heads",)) if found is None else found.query_heads,
        longest=_number(text, ("max_position_embeddings",)) or None if found is None else found.longest,
    )


def _stored(folder: Path) -> int | None:
    """Return the bytes of the tensors in a model folder's safetensors files, or None."""
    if not folder.is_dir():
        return None
    index = folder / "model.safetensors.index.json"
    files = {folder / "model.safetensors"}
    if index.is_file():
        text = read_text(index, "model.safetensors.index.json", option="--model-config")
        try:
            files = {folder / name for name in json.loads(text)["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise KVPolicyError(f"--model-config: {index} is no index of weights; give --weights.") from None
    if not all(each.is_file() for each in files):
        return None
    return sum(each.stat().st_size for each in files)


def _number(text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the first of these fields that is a whole number, or 0."""
    return next((n for name in names if isinstance(n := text.get(name), int) and not isinstance(n, bool)), 0)
