"""An environment of a stranger, who has kvpolicy installed and builds a package on it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

_SHIM = """#!/bin/sh
[ "$1" = install ] && set -- "$@" --no-deps --no-build-isolation --no-index
exec "{python}" -P -m {module} "$@"
"""


class Stranger:
    """A fresh virtual environment in `folder`; what it does not have it takes from this one, so that torch is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
        self.python = home / "bin" / "python"
        (found,) = home.glob("lib/python*/site-packages")
        (found / "this.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        for module in ("kvpolicy", "pip", "pytest"):
            shim = home / "bin" / module
            shim.write_text(_SHIM.format(python=self.python, module=module))
            shim.chmod(0o755)
        self.environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        for name in ("PYTHONPATH", "TRITON_INTERPRET", "KVPOLICY_BACKEND"):
            self.environment.pop(name, None)

    def __call__(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments."""
        return self._run([str(self.python), "-P", *map(str, arguments)], cwd)

    def shell(self, command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one line of a shell; `python`, `pip`, `pytest` and `kvpolicy` are this environment's."""
        return self._run(["bash", "-c", command], cwd)

    def install(self, package: Path) -> None:
        """Build and install a package."""
        succeeded(self._run(["pip", "install", str(package)], None))

    def _run(self, command: list[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True, check=False
        )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command printed; it must have ended well and without a traceback."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout
