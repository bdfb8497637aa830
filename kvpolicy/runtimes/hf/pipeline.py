"""A `pipeline` of transformers that reads a context once and answers questions; importing this registers its task.

::

    import kvpolicy.runtimes.hf.pipeline
    from transformers import pipeline

    answers = pipeline("kv-context-generation", model="...")
    answers(text, question="Who wrote the letter?", policy="snapkv-prefill", budget=0.25)["answer"]
    answers(text, questions=["When?", "To whom?"], policy="snapkv-prefill", budget=0.25)["answers"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from kvpolicy.errors import CacheStateError, SpecError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.context import ContextCache
from kvpolicy.runtimes.hf.given import Amount

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec

TASK: Final = "kv-context-generation"
"""The name of the task."""

_ELSEWHERE: Final = {
    "press": "a press is a policy here: write policy=... and budget=..., the share that stays",
    "compression_ratio": "it is the share that goes: write budget=..., the share that stays",
    "max_context_length": "a context that is too long is refused rather than cut: give a shorter one",
}
_READ: Final = ("policy", "budget", "chunk", "between", "chat", "template")


class ContextPipeline(Pipeline):
    """Answers questions about a context, which is compressed once; the task ``kv-context-generation``.

    A call takes a context or a list of them, and

    - ``question`` or ``questions``: one text or several, asked of each context;
    - ``policy`` and ``budget``: as `kvpolicy.load` takes them; everything is kept if no policy is given;
    - ``chunk``, ``between``, ``chat``, ``template``: as for `ContextCache`;
    - ``answer_prefix``, ``max_new_tokens``, ``batch`` and arguments of ``model.generate``: as for `ContextCache.reply`.

    It returns ``{"answer": text}`` for a question, ``{"answers": [...]}`` for questions; a list of these for a list of
    contexts. All arguments can be given to `pipeline` instead, for every call.

    Raises:
        KVPolicyError: as `ContextCache`, or an argument is missing or kvpress's.
    """

    _load_tokenizer = True

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name, hint in _ELSEWHERE.items():
            if name in given:
                raise UnsupportedError(f"{name}: {hint}.")
        asked = {name: given.pop(name) for name in ("question", "questions") if given.get(name) is not None}
        if len(asked) > 1:
            raise CacheStateError("question, questions: both are given; give one of them.")
        for name in ("question", "questions"):
            given.pop(name, None)
        read: dict[str, Any] = {name: given.pop(name) for name in _READ if name in given}
        # The last one that was asked for, at the call or when the pipeline was made, is meant.
        return {}, {**({"asked": asked} if asked else {}), **read, **given}, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        """Return the context, which is tokenised together with its question."""
        return {"context": getattr(input_, "messages", input_)}  # transformers takes a list of messages for a chat

    def _forward(
        self,
        input_tensors: dict[str, Any],
        *,
        asked: Mapping[str, str | Sequence[str]] | None = None,
        policy: Policy | PolicySpec | str | Path = "full",
        budget: Amount | None = None,
        chunk: int | None = None,
        between: str = "\n\n",
        chat: bool | None = None,
        template: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> dict[str, Any]:
        if not asked:
            raise CacheStateError("question: is missing; give question=... or questions=[...].")
        ((name, question),) = asked.items()
        if (name == "question") != isinstance(question, str):
            raise CacheStateError(f"{name}: should be a {'text' if name == 'question' else 'list of texts'}.")
        if policy == "full" and budget not in (None, 1.0):
            raise SpecError(
                "budget: 'full', the policy if none is given, keeps everything; write policy=... beside it."
            )
        options: dict[str, Any] = {
            "budget": budget,
            "chunk": chunk,
            "between": between,
            "chat": chat,
            "template": template,
        }
        contexts = input_tensors["context"]
        with ContextCache(policy, self.model, self.tokenizer, contexts, **options) as context:
            if isinstance(question, str):
                return {"answer": context.ask(question, **generation)}
            if len(context.tokens) == 1:
                return {"answers": context.ask(question, **generation)}
            rows = zip(*(context.ask(each, **generation) for each in question), strict=True)  # with `batch_size`
            return {"answers": [list(row) for row in rows]}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Return the answers as they are."""
        return model_outputs


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=ContextPipeline, pt_model=AutoModelForCausalLM)
