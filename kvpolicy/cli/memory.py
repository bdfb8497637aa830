"""How much memory a policy takes for a model, a batch and a length: the counters of the engine without a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Final

from kvpolicy.cache.ledger import Incoming, Ledger
from kvpolicy.cli.terminal import messages
from kvpolicy.errors import BudgetError, KVPolicyError
from kvpolicy.inputs import expanded, read_text
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.opening import DEMO_MODEL, REASONER, announce_hub, locate
from kvpolicy.runtimes.shapes import head_shape, layer_fields

DTYPES: Final = {
    **dict.fromkeys(("float32", "fp32"), ("float32", 4)),
    **dict.fromkeys(("bfloat16", "bf16"), ("bfloat16", 2)),
    **dict.fromkeys(("float16", "fp16", "half"), ("float16", 2)),
}
"""What people call a dtype -> its name and its bytes."""

# Caches of these models are not layers x heads x head dim, so the arithmetic below would be wrong.
_UNUSUAL: Final = {
    "kv_lora_rank": "it keeps one latent vector per token (MLA) instead of keys and values per head, and no policy can "
    "be run on it",
    "block_configs": "its cache is not layers x heads x head dim; give --layers, --kv-heads and --head-dim instead",
}


_Heads = dict[tuple[int, int, int], int]
"""`(KV heads, key dim, value dim)` -> layers."""


@dataclass(frozen=True)
class ModelShape:
    """What the size of a cache depends on.

    Attributes:
        layers: layers that a policy works on.
        kv_heads: KV heads of a layer.
        head_dim: size of a key and of a value.
        dtype: its name.
        others: layers that keep a window or a state of their own, which no policy touches.
        source: where the numbers come from.
        unlike: further layers that a policy works on, `(layers, KV heads, head dim)` for each other shape of heads.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    others: int = 0
    source: str = ""
    unlike: tuple[tuple[int, int, int], ...] = ()

    @property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """All layers that a policy works on, as `(layers, KV heads, head dim)` for each shape of heads."""
        return ((self.layers, self.kv_heads, self.head_dim), *self.unlike)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token of one row, over all these layers."""
        return sum(layers * heads * 2 * dim for layers, heads, dim in self.groups) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Course:
    """What one row holds per KV head and layer while a text grows.

    Attributes:
        seen: tokens seen.
        resident: entries held at the end, when what is due has been compacted.
        peak: most entries ever held.
        compactions: how many took place.
        mean: entries that a decode step reads, on average over the steps; its own token's is one of them.
    """

    seen: int
    resident: int
    peak: int
    compactions: int
    mean: float = field(default=0.0, compare=False)


def simulate(policy: Policy, length: int, prompt: int) -> Course:
    """Follow one row from a prompt of so many tokens to `length` tokens, one by one; raises BudgetError as a run would.

    Args:
        policy: whose budget, trigger and phase count.
        length: tokens seen at the end, the prompt included.
        prompt: tokens of the prompt.
    """
    ledger: Ledger[int] = Ledger(policy)
    steps: Iterator[Incoming] = chain(_passes(policy, prompt), repeat(Incoming(1), length - prompt))
    read = 0
    for step in steps:
        _compact(policy, ledger, step, prompt)
        ledger.advance({0: step})
        read += ledger.resident(0) if step.kind == "decode" else 0
    _compact(policy, ledger, Incoming(1), prompt)
    row = ledger.rows[0]
    return Course(row.seen, row.resident, row.peak, row.compactions, read / max(length - prompt, 1))


def _compact(policy: Policy, ledger: Ledger[int], step: Incoming, prompt: int) -> None:
    """Compact the row if it is due before these tokens."""
    for row in ledger.due({0: step}):
        entries, protected = ledger.entries(row), policy.reserved(ledger.rows[row].prompt)
        if protected > entries:
            raise BudgetError(
                f"budget: {entries} entries per head are fewer than the {protected} that are "
                f"protected with a prompt of {prompt} tokens; raise the budget or give a shorter --prompt."
            )
        ledger.compacted(row)


def _passes(policy: Policy, prompt: int) -> Iterator[Incoming]:
    """Yield the forward passes that a prompt comes in, counted from its end as `PolicyCache.prefill` does."""
    size = policy.prefill_chunk or prompt
    first = prompt - (prompt - 1) // size * size
    yield Incoming(first, "prompt")
    for _ in range(first, prompt, size):
        yield Incoming(size, "prompt")


def shape_from_config(place: str, dtype: str | None) -> ModelShape:
    """Read a model's folder, its config.json or an id on the hub; raises KVPolicyError in one sentence.

    Args:
        place: where the configuration is.
        dtype: instead of the one that the configuration names.
    """
    config = read_config(place)
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    for name, why in _UNUSUAL.items():
        if text.get(name):
            raise KVPolicyError(f"--model-config: {place} has `{name}`: {why}.")
    if config.get("is_encoder_decoder"):
        raise KVPolicyError(f"--model-config: {place} is an encoder-decoder model; only decoders are supported.")
    named = dtype or text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    full = dtype_name(str(named or "float32").removeprefix("torch."))
    shapes, others = _heads_of_model(place, config, full) or _heads_of_fields(text, place)
    if any(keys != values for _, keys, values in shapes):
        raise KVPolicyError(
            f"--model-config: {place} has values of another size than its keys, so its cache is not layers x heads x "
            "head dim; give --layers, --kv-heads and the mean of both as --head-dim instead."
        )
    ((heads, dim, _), count), *unlike = shapes.items()
    more = tuple((number, *shape[:2]) for shape, number in unlike)
    return ModelShape(count, heads, dim, full, others, str(config.get("model_type") or place), more)


def _heads_of_model(place: str, config: dict[str, Any], dtype: str) -> tuple[_Heads, int] | None:
    """Return heads, and the number of other layers, as the model's own code has them; None where it is not known."""
    if not config.get("model_type"):
        return None
    from kvpolicy.cli.built import built

    found = built(for_transformers(place), dtype)
    return None if found is None or found.heads is None else (dict(found.heads), found.others)


def _heads_of_fields(text: dict[str, Any], place: str) -> tuple[_Heads, int]:
    """Return heads, and the number of other layers, as a configuration says."""
    layers = _number(text, place, "num_hidden_layers")
    keeping = _layers_with_keys(text, place, layers)
    evictable = [layer for layer in keeping if _has_full_attention(text, layer)]
    if not evictable:
        raise KVPolicyError(f"--model-config: {place} has no full-attention layer, so there is nothing to evict from.")
    value_dim = text.get("v_head_dim")
    shapes = Counter((*_heads(text, place, layer), value_dim) for layer in evictable)
    return {(heads, dim, values or dim): count for (heads, dim, values), count in shapes.items()}, (
        len(keeping) - len(evictable)
    )


def _layers_with_keys(text: dict[str, Any], place: str, layers: int) -> range:
    """Return the layers that keep keys of their own: the last ones may read those of others (Gemma-3n, Gemma-4)."""
    shared = text.get("num_kv_shared_layers")
    if not shared:
        return range(layers)
    count = _number(text, place, "num_kv_shared_layers")
    if count >= layers:
        raise KVPolicyError(
            f"--model-config: `num_kv_shared_layers` of {place} is {count} of {layers} layers; some have to keep keys."
        )
    return range(layers - count)


def _heads(text: dict[str, Any], place: str, layer: int) -> tuple[int, int]:
    """Return the KV heads of a layer and their size, checked."""
    said = layer_fields(text, layer)
    heads = _number(said, place, "num_attention_heads")
    for name in ("num_key_value_heads", "head_dim"):
        if said[name] is not None:
            _number(said, place, name)
    if said["head_dim"] is None:
        hidden = _number(said, place, "hidden_size")
        if hidden % heads:
            raise KVPolicyError(f"--model-config: {place} has hidden_size {hidden} for {heads} heads; add head_dim.")
    return head_shape(said)


def dtype_name(dtype: str) -> str:
    """Return the full name of a dtype; raises KVPolicyError."""
    if dtype not in DTYPES:
        raise KVPolicyError(f"--dtype: {dtype[:40]!r} is not one of float32, bfloat16, float16 (fp32, bf16, fp16).")
    return DTYPES[dtype][0]


def read_config(place: str) -> dict[str, Any]:
    """Return the fields of a configuration, nested ones left in place, with transformers' defaults where it knows them.

    Args:
        place: a model's folder, its config.json, an id on the hub, or the name of a model that comes with kvpolicy.

    Raises:
        KVPolicyError: there is none, or it cannot be read.
    """
    path = folder_of(place)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise KVPolicyError(f"--model-config: {place} holds no config.json; give a model folder.")
    local = path.is_file()
    if not local and (place.startswith((".", "/", "~")) or place.endswith(".json")):
        raise KVPolicyError(f"--model-config: there is no file or folder {place!r}; give a model folder or a hub id.")
    plain = _read_json(path) if local else None
    if plain is not None and not plain.get("model_type"):
        return plain
    return _through_transformers(place, path if local else None, plain)


def folder_of(place: str) -> Path:
    """Return the path that a place stands for; for an id on the hub, one at which nothing is."""
    return Path(locate(place, user="--model-config")) if place in {DEMO_MODEL, REASONER} else expanded(place)


def for_transformers(place: str) -> str:
    """Return what transformers is to open for a place: a path if something is there, else an id on the hub."""
    path = folder_of(place)
    return str(path) if path.exists() else place


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path, "config.json", most=1 << 22, option="--model-config")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise KVPolicyError(f"--model-config: {path} is not JSON; give a model folder or its config.json.") from None
    if not isinstance(data, dict):
        raise KVPolicyError(f"--model-config: {path} is not a JSON object; give a model folder or its config.json.")
    return data


def _through_transformers(place: str, path: Path | None, plain: dict[str, Any] | None) -> dict[str, Any]:
    """Let transformers fill in the defaults of a known kind of model; without it, take the file as it is."""
    try:
        from transformers import AutoConfig
    except ImportError:
        if plain is not None:
            return plain
        raise KVPolicyError("--model-config: a hub id needs transformers; give a folder or a config.json.") from None
    if path is None:
        announce_hub(f"--model-config: there is no file or folder {place!r}", messages().print)
    try:
        found: dict[str, Any] = (
            AutoConfig.from_pretrained(path or place, trust_remote_code=False).get_text_config(decoder=True).to_dict()
        )
    except Exception as error:  # whatever a configuration class makes of a broken file
        if plain is not None and "num_hidden_layers" in plain:
            return plain
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "" if path is not None else "there is no such file or folder, and as an id of the hub: "
        raise KVPolicyError(f"--model-config: {place!r} cannot be read: {where}{reason.rstrip('.:')[:200]}.") from error
    kept = {key: plain[key] for key in ("dtype", "torch_dtype") if key in plain} if plain is not None else {}
    return {**found, **{key: value for key, value in kept.items() if not found.get("dtype")}}


def _has_full_attention(text: dict[str, Any], layer: int) -> bool:
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return layer < len(kinds) and kinds[layer] == "full_attention"
    said = {**text, **layer_fields(text, layer)}
    if any("att" in part for part in said.get("skip") or ()):
        return False
    return not (said.get("sliding_window") and said.get("use_sliding_window", True))


def _number(text: dict[str, Any], place: str, field: str) -> int:
    value = text.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        got = "is missing" if value is None else f"is {str(value)[:40]!r}"
        raise KVPolicyError(f"--model-config: `{field}` of {place} {got}; it should be a whole number above 0.")
    return value
