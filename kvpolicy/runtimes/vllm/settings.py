"""What a user asks of the plugin: which policy, and few things more. No vLLM here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvpolicy.errors import SpecError, did_you_mean
from kvpolicy.spec import PolicySpec, load

VARIABLE: Final = "KVPOLICY_VLLM_POLICY"
"""Environment variable: a policy's name or file, or the settings as JSON, where the engine is given none."""

CHECK_VARIABLE: Final = "KVPOLICY_VLLM_CHECK"
"""Environment variable: 1 arms the checks of every step and compaction."""

KEY: Final = "kvpolicy"
"""The key in vLLM's `--additional-config`."""

_FIELDS: Final = {"policy": str, "budget": (int, float), "set": Mapping, "prompt": int, "any_version": bool}
_KINDS: Final = {
    "policy": "the name or file of a policy", "budget": "a number", "set": "a mapping from dotted paths to values",
    "prompt": "a whole number", "any_version": "true or false",
}  # fmt: skip


@dataclass(frozen=True)
class ServingSettings:
    """Checked settings.

    Attributes:
        spec: the policy, with the budget and the changes that were asked for.
        prompt: a longer prompt than so many tokens is compacted between its pieces; None where only the pool says so.
        any_version: serve in versions of vLLM that kvpolicy has not been tested with, too.
    """

    spec: PolicySpec
    prompt: int | None = None
    any_version: bool = False


def asked(additional_config: Any) -> Mapping[str, Any] | None:
    """Return the settings as they were written, of the engine or else of the environment; None where there are none.

    Args:
        additional_config: vLLM's `--additional-config`.

    Raises:
        SpecError: they are neither a name, a file nor a mapping.
    """
    said = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    where = f"--additional-config: {KEY}"
    if said is None:
        said, where = os.environ.get(VARIABLE) or None, VARIABLE
        if isinstance(said, str) and said.lstrip().startswith("{"):
            try:
                said = json.loads(said)
            except ValueError as error:
                raise SpecError(f'{where}: this is no JSON ({error}); write \'{{"policy": "rkv"}}\'.') from None
    if said is None:
        return None
    if isinstance(said, str):
        said = {"policy": said}
    if not isinstance(said, Mapping):
        raise SpecError(f"{where}: a policy's name or a mapping was expected, not {said!r}; write {{'policy': 'rkv'}}.")
    return said


def settings(said: Mapping[str, Any]) -> ServingSettings:
    """Return the settings that were asked for, with their policy read.

    Args:
        said: what `asked` returned: `policy` (a registered name or a file), `budget`, `set` (dotted paths to values),
            `prompt` and `any_version`.

    Raises:
        SpecError: a field is not known or has another type, or the policy is not valid.
    """
    for name, value in said.items():
        if name not in _FIELDS:
            raise SpecError(
                f"{KEY}.{name}: there is no such setting; write one of {', '.join(_FIELDS)}."
                f"{did_you_mean(str(name), _FIELDS)}"
            )
        wanted: Any = _FIELDS[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise SpecError(f"{KEY}.{name}: {value!r} is not {_KINDS[name]}.")
    if "policy" not in said:
        raise SpecError(f"{KEY}: no policy is named; write {{'{KEY}': {{'policy': 'rkv'}}}}.")
    prompt = said.get("prompt")
    if prompt is not None and prompt < 1:
        raise SpecError(f"{KEY}.prompt: {prompt} tokens are no prompt; write at least 1, or leave it out.")
    spec = load(said["policy"])
    changes = {**({"budget": said["budget"]} if "budget" in said else {}), **said.get("set", {})}
    return ServingSettings(spec.replace(changes) if changes else spec, prompt, said.get("any_version", False))


def armed() -> bool:
    """Return whether every step is to be checked."""
    return os.environ.get(CHECK_VARIABLE, "") not in ("", "0")
