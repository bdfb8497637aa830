"""Wheel and sdist, built and installed into fresh environments, and the types as a downstream project sees them.

An environment is made for the oldest and the newest Python and transformers that are supported; what is not on the
machine (an interpreter, a build of torch for it, a network) is skipped by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from kvsupport import downstream

pytestmark = [pytest.mark.install, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
OLDEST = next(each for each in PROJECT["optional-dependencies"]["hf"] if each.startswith("transformers")).split(">=")[1]
NEWEST = "5.24"
ENVIRONMENTS = {"oldest": ("3.11", f"transformers=={OLDEST}.*"), "newest": ("3.13", f"transformers=={NEWEST}.*")}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

SMOKE = """
import kvpolicy, torch, transformers
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model

model = tiny_model("llama")
spec = kvpolicy.load("rkv", budget=24).replace("trigger.every", 8)
with PolicyCache(spec, model) as cache:
    out = model.generate(torch.arange(3, 23)[None], past_key_values=cache, max_new_tokens=40, do_sample=False)
assert out.shape == (1, 60)
assert cache.stats().peak_resident <= 32 and cache.stats().compactions > 0
print("kept", len(cache.kept(0, 0)), "of", cache.stats().seen)
"""


def ran(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command away from the checkout, and return what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, env={**clean, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def interpreter(version: str) -> str:
    """Return an interpreter of a version, or skip."""
    homes = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python{version}"))
    found = homes[-1] if homes else shutil.which(f"python{version}")
    if found is None:
        pytest.skip(f"there is no Python {version} on this machine")
    return str(found)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Build sdist and wheel out of a copy, the wheel out of the sdist; return both."""
    source, made = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "shared")
    shutil.copytree(ROOT, source, ignore=skip, symlinks=True)
    ran(sys.executable, "-P", "-m", "build", "--outdir", made, source, cwd=made)
    (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session", params=list(ENVIRONMENTS))
def environment(request, built, tmp_path_factory):
    """Install the wheel with the extra `hf` into a new environment; return its Python."""
    version, transformers = ENVIRONMENTS[request.param]
    base, home = interpreter(version), tmp_path_factory.mktemp(request.param)
    kept = os.environ.get(f"KVPOLICY_ENVIRONMENT_{request.param.upper()}")
    if kept:  # one in which torch is there already: it is what takes gigabytes
        python = Path(kept) / "bin" / "python"
    else:
        ran(base, "-m", "venv", home / "venv", cwd=home)
        python = home / "venv" / "bin" / "python"
        pip = [str(python), "-m", "pip", "install", "-q"]
        default = sys.platform != "linux" or os.environ.get("KVPOLICY_TORCH") == "default"
        index = [] if default else ["--index-url", CPU_INDEX]
        local = subprocess.run([*pip, "--no-index", f"{TORCH}+cpu", "--no-deps"], capture_output=True, check=False)
        if local.returncode and subprocess.run([*pip, TORCH, *index], capture_output=True, check=False).returncode:
            pytest.skip(f"no CPU build of {TORCH} for Python {version} can be had; KVPOLICY_TORCH=default takes PyPI's")
    before = installed(python, home)
    ran(python, "-m", "pip", "install", "-q", f"{built[1]}[hf]", transformers, TORCH, cwd=home)
    return python, home, before


def installed(python: Path, home: Path) -> set[str]:
    lines = ran(python, "-m", "pip", "list", "--format", "freeze", cwd=home).splitlines()
    return {line.partition("==")[0].lower().replace("_", "-") for line in lines}


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"kvpolicy", "kvpolicy_plugins", "kvpolicy_kernels", "kvpolicy_registry"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    here = {path.relative_to(ROOT / "registry").as_posix() for path in (ROOT / "registry").rglob("*.yaml")}
    assert here
    assert here <= set(names)
    assert any(name.startswith("kvpolicy/runtimes/models/reasoner/") for name in names)
    assert f"Version: {PROJECT['version']}" in metadata
    with tarfile.open(sdist) as archive:
        inner = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "kvpolicy/py.typed"} <= inner


def test_it_works_where_nothing_else_is_installed(environment):
    python, home, _ = environment
    assert "kept 2" in ran(python, "-P", "-c", SMOKE, cwd=home)
    script = python.with_name("kvpolicy")
    assert PROJECT["version"] in ran(script, "--version", cwd=home)
    assert '"rkv"' in ran(script, "list", "--json", cwd=home)
    assert "is valid" in ran(script, "validate", "rkv", cwd=home)
    assert "gain" in ran(script, "plan", "rkv", "--gpu", "L40S", cwd=home)
    ran(python, "-m", "pip", "check", cwd=home)


def test_it_brings_no_engine_no_compiler_and_no_cuda_beyond_torch_s(environment):
    python, home, before = environment
    brought = installed(python, home) - before
    assert not {each for each in brought if each.startswith(("vllm", "triton", "nvidia", "cuda", "cupy"))}


def test_an_sdist_installs_into_the_same(environment, built):
    python, home, _ = environment
    ran(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", built[0], cwd=home)
    assert "kept 2" in ran(python, "-P", "-c", SMOKE, cwd=home)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_downstream_project_sees_the_types(environment, checker, tmp_path):
    python, home, _ = environment
    if home.name.startswith("oldest"):
        pytest.skip("type checkers are run in the newest environment")
    got = subprocess.run([python, "-m", "pip", "install", "-q", checker], capture_output=True, check=False)
    if got.returncode:
        pytest.skip(f"{checker} cannot be installed here")
    command = [python, "-m", checker, *(["--strict"] if checker == "mypy" else ["--pythonpath", python])]

    def check(body: str) -> subprocess.CompletedProcess[str]:
        path = downstream.write(tmp_path / "project", body)
        return subprocess.run([*command, path], cwd=path.parent, capture_output=True, text=True, check=False)

    right = check(downstream.RIGHT)
    if checker == "pyright" and "0 errors" not in right.stdout and "error:" not in right.stdout:
        pytest.skip(f"pyright cannot fetch what it runs on: {(right.stdout + right.stderr)[-200:]}")
    assert right.returncode == 0, right.stdout
    wrong = check(downstream.wrong_module())
    for line, (expression, what) in enumerate(downstream.WRONG.items(), 3):
        assert f"downstream.py:{line}:" in wrong.stdout, (expression, what, wrong.stdout)
