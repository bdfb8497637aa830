"""A page with every command and its options, from the command line itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from kvpolicy.cli.app import app
from kvsite.markdown import code, table

_METAVARS = {"int": "N", "float": "NUMBER", "path": "FILE"}
HEAD = """\
# Commands

Every command of `kvpolicy`, as `kvpolicy COMMAND --help` says it. `kvpolicy --debug COMMAND` shows the traceback of an
error. The exit status is 0, or 1 after an error, or 2 where the words make no sense.
"""


def pages() -> dict[str, str]:
    """Return path and text of the page."""
    root: Any = get_command(app)
    return {"reference/commands.md": "\n\n".join([HEAD.rstrip(), *_sections(root, "kvpolicy")]) + "\n"}


def _sections(group: Any, path: str) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        whole = f"{path} {name}"
        if hasattr(command, "commands"):
            yield from _sections(command, whole)
            continue
        rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        about = " ".join((command.help or "").split("\f")[0].split())
        arguments = " ".join(_metavar(p) for p in command.params if p.param_type_name == "argument")
        yield f"## {whole}"
        yield about
        yield f"```text\n{whole} {arguments}".rstrip() + " [OPTIONS]\n```"
        yield table(("argument or option", "default", "meaning"), rows)


def _row(parameter: Any) -> tuple[str, str, str]:
    given = parameter.default
    silent = given is None or given is False or callable(given) or type(given).__name__ == "Sentinel"
    default = "" if silent else code(str(given))
    if parameter.param_type_name == "argument":
        return code(_metavar(parameter)), default, parameter.help or ""
    metavar = "" if parameter.is_flag else f" {_metavar(parameter)}"
    return ", ".join(code(name + metavar) for name in parameter.opts), default, parameter.help or ""


def _metavar(parameter: Any) -> str:
    """Return what stands for a value; typer keeps its type in different places in different versions."""
    if parameter.metavar or parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    described = getattr(parameter, "type_descriptor", None)
    kind = str(getattr(described, "annotation", None) or getattr(parameter, "type", ""))
    return next((name for word, name in _METAVARS.items() if word in kind.lower()), "TEXT")
