"""Docstrings: what stands between single backticks is a name of the interface, with a link, or else code."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.roles import XRefRole

_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*(\(\))?")


class CodeOrName(XRefRole):
    """The role of single backticks in docstrings."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return a reference to a Python object where the text can be one, and code otherwise."""
        if not _NAME.fullmatch(self.text):
            return [nodes.literal(self.rawtext, self.text)], []
        self.refdomain, self.reftype = "py", "obj"
        made = pending_xref(
            self.rawtext, refdomain="py", reftype="obj", reftarget=self.text.removesuffix("()"), refexplicit=False,
            refwarn=False, refdoc=self.env.docname, soft=True,
            **{"py:module": self.env.ref_context.get("py:module"), "py:class": self.env.ref_context.get("py:class")},
        )  # fmt: skip
        if self.text.rpartition(".")[2][0].isupper():
            made["refspecific"] = True  # a class is found by its name, in whichever module it is
        made += nodes.literal(self.rawtext, self.text, classes=["xref", "py", "py-obj"])
        return [made], []


def leave_as_code(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Return what a reference shows where single backticks held no name of the interface."""
    return content if node.get("soft") else None


_SAID: dict[str, list[str]] = {}
_PLAIN = ("attribute", "data", "property")


def keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Hide what is said of an attribute from napoleon, which takes the words before a colon for a type."""
    if what in _PLAIN:
        _SAID[name] = list(lines)
        lines[:] = []


def give_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Say it again, when napoleon is done."""
    if what in _PLAIN:
        lines[:] = _SAID.pop(name, lines)


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what belongs to pydantic, and what is no part of the interface."""
    if name.startswith(("model_", "_")) or name == "memo" or getattr(BaseModel, name, None) is not None:
        return True
    return None
