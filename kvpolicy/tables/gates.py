"""Gates: small learned maps from what a layer's attention reads of a token to one number for each KV head.

Two outputs are known. A *score* says how much the entry will be attended to (KVzap, arXiv:2601.07891). A *retention*
is the logit of the share ``beta`` of an entry's worth that is left after each further token (TRIM-KV,
arXiv:2512.03324). Both are published as files of their own, which are read as they are: see `published_gates`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.errors import TableError
from kvpolicy.inputs import read_text

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}
"""Functions between the maps of a gate, by the name in the table's metadata (``activation``)."""

OUTPUTS: Final = ("score", "retention")
"""What a gate's number means, by the name in the table's metadata (``output``)."""

_ALIASES: Final = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}
_TOKENS: Final = 4096  # of a row that are brought to fp32 at a time
_MOST_CONFIG: Final = 1 << 20

_KVZAP: Final = re.compile(r"layers\.(\d{1,5})\.(?:(0|2)\.)?(weight|bias)")
_TRIM_KV: Final = re.compile(
    r"(?:.*\.)?layers\.(\d{1,5})\.self_attn\.retention_gate\.(?:linear([123])\.(weight|bias)|(bias))"
)
_ANY_RETENTION: Final = re.compile(r".*\.retention_gate\..*")


def gate_of(layer: Mapping[str, Tensor], hidden_states: Tensor, activation: str) -> Tensor:
    """Return what a layer's gate says of tokens, fp32 `[B, H, q]`.

    Args:
        layer: the gate's tensors, as `Table.of_layer` returns them: ``hidden0_weight`` `[W, E]`, ``hidden0_bias``
            `[W]`, perhaps ``hidden1_weight`` `[W, W]` and its bias, ``output_weight`` `[H, W]`, ``output_bias`` `[H]`;
            without hidden maps ``output_weight`` is `[H, E]`.
        hidden_states: `[B, q, E]`, in any dtype.
        activation: name out of `ACTIVATIONS`, of the function behind each hidden map.
    """
    made = []
    for part in hidden_states.split(_TOKENS, 1):
        x = part.float()
        for number in (0, 1):
            if f"hidden{number}_weight" in layer:
                x = functional.linear(x, layer[f"hidden{number}_weight"], layer[f"hidden{number}_bias"])
                x = ACTIVATIONS[activation](x)
        made.append(functional.linear(x, layer["output_weight"], layer["output_bias"]))
    return torch.cat(made, 1).transpose(1, 2)


def gate_problem(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str | None:
    """Return what is wrong with a table of gates beyond the shapes of its tensors, or None."""
    for number in (0, 1):
        if (f"hidden{number}_weight" in tensors) != (f"hidden{number}_bias" in tensors):
            return f"has one of hidden{number}_weight and hidden{number}_bias; it should have both or none."
    if "hidden1_weight" in tensors and "hidden0_weight" not in tensors:
        return "has a second hidden map and no first one."
    if notes.get("output") not in OUTPUTS:
        return f"its metadata should say `output`, {' or '.join(OUTPUTS)}: what the gate's number means."
    if "hidden0_weight" in tensors and notes.get("activation") not in ACTIVATIONS:
        return f"its metadata should say `activation`, one of {', '.join(ACTIVATIONS)}."
    return None


def published_gates(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any] | None:
    """Return a table's fields for gates in the format that their authors publish; None for any other file.

    - KVzap: ``layers.L.weight`` `[H, E]` and ``layers.L.bias`` (linear), or ``layers.L.0.*`` `[W, E]` and
      ``layers.L.2.*`` `[H, W]` with GELU between them.
    - TRIM-KV: ``….layers.L.self_attn.retention_gate.linear1.*``, ``linear2.*`` and, in DBTrimKV, ``linear3.*``, each
      but the last with the model's activation behind it, and a ``bias`` `[H]`. The activation is ``hidden_act`` of a
      ``config.json`` beside the file, SiLU without one.

    Args:
        tensors: the file's tensors by name.
        path: the file; a ``config.json`` beside it is read if there is one.

    Raises:
        TableError: a gate is not complete, or reads something else than hidden states.
    """
    found = _of_kvzap(tensors) or _of_trim_kv(tensors, path)
    if found is None:
        return None
    method, by_layer = found
    layers = _in_order(by_layer, path)
    try:
        stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        heads = stacked["output_bias"].shape[1]
    except (KeyError, RuntimeError, IndexError) as error:
        raise TableError(
            f"table {str(path)!r}: its gates are not alike in all layers ({str(error).splitlines()[0][:120]}); give "
            "the complete file of one model."
        ) from None
    config = _config_beside(path)
    activation = "gelu"
    if method == "trim-kv":
        said = str(config.get("hidden_act", "silu"))
        activation = _ALIASES.get(said, said)
    model = config.get("base_model") or path.resolve().parent.name or path.stem
    return {
        "model": str(model)[:100],
        "method": method,
        "num_layers": len(layers),
        "num_kv_heads": heads,
        "tensors": stacked,
        "command": "",
        "notes": {"activation": activation, "output": "retention" if method == "trim-kv" else "score"},
    }


_Found = tuple[str, dict[int, dict[str, Tensor]]]


def _of_kvzap(tensors: Mapping[str, Tensor]) -> _Found | None:
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KVZAP.fullmatch(name)
        if match is None:
            return None
        index, place, part = match.groups()
        by_layer.setdefault(int(index), {})[f"{'hidden0' if place == '0' else 'output'}_{part}"] = tensor
    return ("kvzap", by_layer) if by_layer else None


def _of_trim_kv(tensors: Mapping[str, Tensor], path: Path) -> _Found | None:
    gates = {name: tensor for name, tensor in tensors.items() if _ANY_RETENTION.fullmatch(name)}
    if not gates:
        return None
    kind = _config_beside(path).get("retention_gate")
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in gates.items():
        match = _TRIM_KV.fullmatch(name)
        if match is None or kind not in (None, "rg", "rg10"):
            what = repr(kind) if match is not None else name
            raise TableError(
                f"table {str(path)!r}: has retention gates of another form ({what}); those of TRIM-KV (rg) and "
                "DBTrimKV (rg10), which read hidden states, can be used."
            )
        index, number, part, bias = match.groups()
        parts.setdefault(int(index), {})[bias or f"{number}_{part}"] = tensor
    return "trim-kv", {index: dict(_renamed(layer)) for index, layer in parts.items()}


def _renamed(layer: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    last = "3" if "3_weight" in layer else "2"
    for name, tensor in layer.items():
        number, _, part = name.partition("_")
        if name == "bias":
            yield "output_bias", tensor
        elif number == last:
            yield f"output_{part}", tensor
        else:
            yield f"hidden{int(number) - 1}_{part}", tensor


def _in_order(by_layer: Mapping[int, dict[str, Tensor]], path: Path) -> list[dict[str, Tensor]]:
    missing = sorted(set(range(max(by_layer) + 1)) - set(by_layer))
    if missing:
        raise TableError(
            f"table {str(path)!r}: has no gate for layer {missing[0]}, and one for layer {max(by_layer)}; give the "
            "complete file."
        )
    return [by_layer[index] for index in range(len(by_layer))]


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        read = json.loads(read_text(file, "model configuration", most=_MOST_CONFIG, error=TableError))
    except (ValueError, RecursionError):
        raise TableError(f"table {str(path)!r}: the config.json beside it is not JSON; mend or remove it.") from None
    return read if isinstance(read, dict) else {}
