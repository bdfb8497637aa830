"""What an installation promises: light imports, the entry points, and folders that shadow nobody."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["kvpolicy", "kvpolicy_plugins", "kvpolicy_kernels", "kvpolicy_registry"]


def sources(*packages):
    """Return the source files of installed packages, whose folders need not be imported for that."""
    folders = [Path(spec.origin).parent for package in packages if (spec := find_spec(package)) and spec.origin]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=cwd, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_import_kvpolicy_is_light(tmp_path):
    heavy = {"transformers", "triton", "accelerate", "kvpolicy_plugins", "kvpolicy_kernels", "kvpolicy_registry"}
    assert not loaded_by("import kvpolicy", tmp_path) & (heavy - loaded_by("import torch", tmp_path))


def test_kernels_package_imports_without_triton(tmp_path):
    assert "triton" not in loaded_by("import kvpolicy_kernels", tmp_path)


@pytest.mark.parametrize("folder", ["kernels", "plugins", "registry"])
def test_outer_folders_are_not_packages(folder):
    # kernels/__init__.py would shadow the PyPI package `kernels`, which transformers looks for.
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["the root", "tests"])
def test_folders_with_a_folder_kernels_are_not_importable(folder):
    assert (folder / "kernels").is_dir()
    assert folder not in {Path(entry or ".").resolve() for entry in sys.path}


def test_helpers_of_the_tests_are_not_installed(tmp_path):
    assert find_spec("kvsupport") is not None
    program = "from importlib.util import find_spec; print(find_spec('kvsupport'))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None"


def test_bundles_enter_by_entry_points():
    found = {(entry.name, entry.value) for entry in entry_points(group="kvpolicy")}
    assert found >= {
        ("builtin-plugins", "kvpolicy_plugins"),
        ("builtin-kernels", "kvpolicy_kernels"),
        ("builtin-policies", "kvpolicy_registry"),
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()


def test_no_class_name_means_two_things():
    homes = defaultdict(list)
    for path in sources(*PACKAGES, "kvsupport"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name.strip("_")].append(path.name)
    assert len(homes) > 200
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_no_file_is_too_long_to_read():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES)}
    assert not {name: lines for name, lines in lengths.items() if lines >= 400}
