"""Where something is defined in a package's sources, without importing it."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kvpolicy.errors import KVPolicyError

Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = Function | ast.ClassDef
_Scope = ast.Module | ast.ClassDef


class Sources:
    """The sources of a vLLM. Modules are named without the leading `vllm.`.

    Args:
        path: a wheel, a folder that holds `vllm/` (site-packages, say), or that folder itself.

    Raises:
        KVPolicyError: there is no vLLM in it.
    """

    def __init__(self, path: Path) -> None:
        if zipfile.is_zipfile(path):
            wheel = zipfile.ZipFile(path)
            files: dict[str, Callable[[], bytes]] = {
                name: partial(wheel.read, name) for name in wheel.namelist() if name.startswith("vllm/")
            }
        else:
            parent = path.parent if path.name == "vllm" else path
            files = {str(file.relative_to(parent)): file.read_bytes for file in parent.glob("vllm/**/*.py")}
        self._files = {name.removeprefix("vllm/"): read for name, read in files.items() if name.endswith(".py")}
        self._trees: dict[str, ast.Module | None] = {}
        if "__init__.py" not in self._files:
            raise KVPolicyError(f"{path} holds no vllm/__init__.py; give a wheel of vLLM or a folder that holds vllm/.")

    @property
    def version(self) -> str:
        """What the package calls itself, `unknown` where it does not."""
        said = _own(self.tree("_version"), "__version__")
        value = getattr(said, "value", None)
        return str(value.value) if isinstance(value, ast.Constant) else "unknown"

    def tree(self, module: str) -> ast.Module | None:
        """Return a module's syntax tree, None if there is no such module."""
        if module not in self._trees:
            stem = module.replace(".", "/")
            read = self._files.get(f"{stem}.py", self._files.get(f"{stem}/__init__.py"))
            self._trees[module] = ast.parse(read()) if read else None
        return self._trees[module]

    def find(self, module: str, name: str, _on_the_way: frozenset[tuple[str, str]] = frozenset()) -> ast.AST | None:
        """Return what defines a name: in the module, where it imports it from, or in a base of its class."""
        if (module, name) in _on_the_way:  # `class A(A)` over an imported one
            return None
        way = _on_the_way | {(module, name)}
        first, _, rest = name.partition(".")
        found = _own(self.tree(module), first)
        if isinstance(found, ast.ImportFrom):
            origin, real = _origin(module, found, first)
            return self.find(origin, f"{real}.{rest}" if rest else real, way)
        if not rest or found is None:
            return found
        inside = _own(found, rest)
        if inside is None and isinstance(found, ast.ClassDef):
            bases = (self.find(module, f"{ast.unparse(base).split('[')[0]}.{rest}", way) for base in found.bases)
            inside = next((each for each in bases if each is not None), None)
        return inside

    def moved(self, module: str, name: str) -> list[str]:
        """Return the modules that define a name that its own module neither defines nor imports any more."""
        first = name.partition(".")[0]
        if _own(self.tree(module), first) is not None:
            return []
        texts = (f"def {first}(".encode(), f"class {first}(".encode(), f"class {first}:".encode())
        homes = []
        for file, read in self._files.items():
            home = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if not any(map(read().__contains__, texts)):
                continue
            if isinstance(_own(self.tree(home), first), _Definition) and self.find(home, name) is not None:
                homes.append(home)
        return sorted(homes)


def _origin(module: str, statement: ast.ImportFrom, name: str) -> tuple[str, str]:
    """Return the module that a name is imported from, and what it is called there."""
    real = next(a.name for a in statement.names if name == (a.asname or a.name))
    origin = statement.module or ""
    if statement.level:
        parts = module.split(".")[: -statement.level]
        origin = ".".join([*parts, *([origin] if origin else [])])
    return origin.removeprefix("vllm."), real


def _own(scope: ast.AST | None, name: str) -> ast.AST | None:
    """Return the last statement of a module or class that defines a name; in a class, also by setting it on `self`."""
    found: ast.AST | None = None
    for node in _statements(scope):
        if name in _names(node):
            found = node
    if found is None and isinstance(scope, ast.ClassDef):
        return next((node for node in ast.walk(scope) if f"self.{name}" in _names(node)), None)
    return found


def _names(node: ast.AST) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, _Definition):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [a.asname or a.name for a in node.names]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return [ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    return []


def _statements(scope: ast.AST | None) -> Iterator[ast.stmt]:
    """Yield what stands in a module or class, also under `if` and `try`."""
    if isinstance(scope, _Scope | ast.If | ast.Try):
        for node in [*scope.body, *getattr(scope, "orelse", ())]:
            yield node
            yield from _statements(node) if isinstance(node, ast.If | ast.Try) else ()
