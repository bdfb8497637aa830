"""`kvpolicy new plugin`: a package with a scorer, an allocator, two policies and tests, ready to install."""

from __future__ import annotations

import keyword
import re
import secrets
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer

_RESERVED: Final = re.compile(r"con|prn|aux|nul|com\d|lpt\d")

new = typer.Typer(help="Write a skeleton to start from.", no_args_is_help=True)


@new.callback()
def _only_subcommands() -> None:
    """Make `plugin` a command of its own although it is the only one."""


@new.command()
def plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the package, such as my-plugin.")],
    *,
    into: Annotated[Path, typer.Option(help="Folder in which the new folder is made.")] = Path(),
) -> None:
    """Write a package NAME with an importance scorer, a budget allocator, two policies and tests into a new folder."""
    from kvpolicy.odd_text import harmless

    folder = write_plugin(name, into)
    with_tests = shlex.quote(f"{folder}[test]")  # pytest and hypothesis too
    steps = [f"pip install -e {with_tests}", f"pytest {shlex.quote(str(folder))}", f"kvpolicy explain {name}"]
    typer.echo(harmless("\n  ".join([f"{folder}: written. Next:", *steps])))


def write_plugin(name: str, into: Path) -> Path:
    """Write the package and return its folder; raises KVPolicyError in one sentence and leaves nothing behind."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.outputs import replace_file

    check_name(name)
    folder = into / name
    if folder.exists() or folder.is_symlink():
        raise KVPolicyError(f"NAME: {folder} exists already; choose another name or remove it first.")
    if not into.is_dir():
        raise KVPolicyError(f"--into: there is no folder {into}; make it first.")
    beside = into / f".{name}.{secrets.token_hex(6)}.part"
    try:
        beside.mkdir()
        for path, text in rendered(name).items():
            target = beside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, text, "NAME")
        beside.rename(folder)  # refused if something has come to stand there
    except OSError as error:
        raise KVPolicyError(f"NAME: {folder} cannot be written ({error.strerror}); choose another folder.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def check_name(name: str) -> None:
    """Refuse what cannot name a package, a module and a component alike; raises KVPolicyError."""
    from kvpolicy.errors import KVPolicyError

    if len(name) > 64 or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise KVPolicyError(
            f"NAME: {name[:80]!r} is not a name for a plugin; use small letters, digits and single dashes, such as "
            "my-plugin."
        )
    module = module_of(name)
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise KVPolicyError(f"NAME: {name!r} is a word of Python itself; choose another name, such as {name}-plugin.")
    if _RESERVED.fullmatch(name):
        raise KVPolicyError(f"NAME: {name!r} is a device on Windows, no folder; choose another name.")
    if module in ("kvpolicy", "tests") or _installed(name, module):
        raise KVPolicyError(
            f"NAME: {name!r} is the name of an installed package or module, which would be hidden; choose another name."
        )
    import kvpolicy

    catalog = kvpolicy.catalog()
    brought = {"policy": (name, f"{name}-slope"), "importance": (f"{module}_size",), "allocator": (f"{module}_slope",)}
    for kind, names in brought.items():
        for each in set(names) & set(catalog.names(kind)):
            raise KVPolicyError(
                f"NAME: {name!r} would register the {kind} {each!r}, which is there; choose another name."
            )


def _installed(name: str, module: str) -> bool:
    """Whether a package or module of that name can be imported or uninstalled here."""
    try:
        distribution(name)
    except PackageNotFoundError:
        spec = find_spec(module)
        return spec is not None and spec.origin is not None  # a folder in the working directory is no package
    return True


def module_of(name: str) -> str:
    """Return the name of the module: dashes become underscores."""
    return name.replace("-", "_")


def rendered(name: str) -> dict[str, str]:
    """Return the files of the package by relative path."""
    from kvpolicy.cli.skeleton import FILES

    module = module_of(name)
    words = {
        "@@name@@": name,
        "@@module@@": module,
        "@@Class@@": "".join(part.capitalize() for part in name.split("-")),
    }

    def filled(text: str) -> str:
        for mark, word in words.items():
            text = text.replace(mark, word)
        return text

    return {filled(path): filled(text) for path, text in FILES.items()}
