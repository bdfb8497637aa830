"""Pages of the Python interface: what is public, by package; autodoc reads the docstrings."""

from __future__ import annotations

from dataclasses import dataclass

import kvpolicy
import kvpolicy.ops
import kvpolicy.testing


@dataclass(frozen=True)
class Part:
    """A page.

    Attributes:
        name: of the package or module, and of the page.
        about: one or two sentences of reStructuredText.
        members: dotted names.
    """

    name: str
    about: str
    members: tuple[str, ...]


def _of(package: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{package}.{name}" for name in names)


def parts() -> list[Part]:
    """Return the pages, in order."""
    from kvpolicy.runtimes import hf  # loads transformers, which reading the configuration must not

    public = [name for name in kvpolicy.__all__ if not name.startswith("__")]
    return [
        Part("kvpolicy", "Everything that most programs need.", _of("kvpolicy", *public)),
        Part(
            "kvpolicy.contracts",
            "What a plugin author sees besides the names of :mod:`kvpolicy`.",
            _of("kvpolicy.contracts.components", "KINDS", "NEEDS", "AllocationRequest", "Slots", "kind_of")
            + _of("kvpolicy.contracts.trigger", "Counters")
            + _of("kvpolicy.contracts.heads", "HeadSpan")
            + _of("kvpolicy.contracts.ranks", "Ranks")
            + _of("kvpolicy.contracts.backend", "Backend")
            + _of("kvpolicy.policy.traits", "Traits")
            + _of("kvpolicy.policy.decision", "Decision", "Scored")
            + _of("kvpolicy.policy.scoring", "once"),
        ),
        Part(
            "kvpolicy.types",
            "Tensors with named axes, as signatures have them.",
            _of(
                "kvpolicy.types",
                "Keys",
                "Values",
                "Queries",
                "Weights",
                "Scores",
                "Mask",
                "Positions",
                "Counts",
                "Lengths",
                "KeepIndices",
            ),
        ),
        Part(
            "kvpolicy.ops",
            "The mathematics in plain torch: the definition of right.",
            _of("kvpolicy.ops", *(name for name in kvpolicy.ops.__all__ if name != "Backend")),
        ),
        Part(
            "kvpolicy.runtimes.hf",
            "Policies in transformers.",
            _of("kvpolicy.runtimes.hf", *hf.__all__) + _of("kvpolicy.runtimes.hf.pipeline", "ContextPipeline"),
        ),
        Part(
            "kvpolicy.runtimes.vllm",
            "Policies in vLLM. ``kvpolicy.runtimes.vllm.Worker`` is the class that ``--worker-cls`` names; it is made "
            "from vLLM's own worker when vLLM asks for it.",
            _of("kvpolicy.runtimes.vllm", "register")
            + _of("kvpolicy.runtimes.vllm.settings", "ServingSettings")
            + _of("kvpolicy.runtimes.vllm.refusals", "policy_refusal"),
        ),
        Part(
            "kvpolicy.study",
            "Ablation studies: files, results, and what follows from them.",
            _of("kvpolicy.study.spec", "StudySpec", "find_study")
            + _of("kvpolicy.study.results", "Results", "ResultsError")
            + _of("kvpolicy.study.analysis", "summarise", "compare", "Estimate", "VariantSummary", "Comparison"),
        ),
        Part(
            "kvpolicy.trace",
            "What a policy kept of a text: a recorder, what it recorded, and the page.",
            _of("kvpolicy.trace.recorder", "Recorder")
            + _of("kvpolicy.trace.recording", "Recording", "Snapshot")
            + _of("kvpolicy.trace.running", "record_generation", "record_reading")
            + _of("kvpolicy.trace.pieces", "pieces")
            + _of("kvpolicy.trace.page", "Shown", "trace_page"),
        ),
        Part(
            "kvpolicy.testing",
            "For tests of plugins; needs the extra ``test``.",
            _of("kvpolicy.testing", *kvpolicy.testing.__all__)
            + _of("kvpolicy.testing.tiny", "tiny_model", "tiny_folder"),
        ),
    ]


def pages() -> dict[str, str]:
    """Return path and text of all pages, which are reStructuredText as docstrings are."""
    made = {f"reference/api/{part.name}.rst": _page(part) for part in parts()}
    listed = "\n".join(f"- :doc:`{part.name}`: {part.about}" for part in parts())
    tree = "\n".join([".. toctree::", "   :hidden:", "", *(f"   {part.name}" for part in parts())])
    head = (
        "Python interface\n================\n\n"
        "What is public. Names that are not on these pages may change at any time. Axes of tensors: ``B`` rows,\n"
        "``H`` KV heads, ``G`` query heads per KV head, ``N`` slots, ``Q`` observed queries, ``D`` and ``Dv`` sizes."
    )
    made["reference/api/index.rst"] = f"{head}\n\n{listed}\n\n{tree}\n"
    return made


def _page(part: Part) -> str:
    lines = [part.name, "=" * len(part.name), "", f".. py:module:: {part.name}", "", part.about, ""]
    for member in part.members:
        lines += _directive(member)
    return "\n".join(lines) + "\n"


SAID = {
    "kvpolicy.hookimpl": "Marks a function of a plugin as one that kvpolicy calls, such as "
    "``kvpolicy_register_components(register)``; :doc:`/write-a-plugin` describes all of them.",
    "kvpolicy.testing.LAWS": "All laws by name, each a :class:`~kvpolicy.testing.Law`; :doc:`/laws` lists them.",
}
"""What is said of objects that have no docstring of their own."""


def _directive(member: str) -> list[str]:
    if member in SAID:
        return [f".. py:data:: {member}", "", f"   {SAID[member]}", ""]
    module, _, name = member.rpartition(".")
    value = getattr(__import__(module, fromlist=[name]), name)
    if isinstance(value, type):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        options = ["   :members:", "   :show-inheritance:"] if kind == "autoclass" else ["   :show-inheritance:"]
        return [f".. {kind}:: {member}", *options, ""]
    if callable(value) and hasattr(value, "__code__"):
        return [f".. autofunction:: {member}", ""]
    return [f".. autodata:: {member}", "   :no-value:", ""]
