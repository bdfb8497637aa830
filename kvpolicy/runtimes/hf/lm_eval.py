"""lm-evaluation-harness models that generate and score under a policy; importing this registers ``kvpolicy``.

From Python: ``lm_eval.simple_evaluate(model=PolicyLM(pretrained=..., policy="rkv", budget=256), tasks=[...])``. On the
command line: ``python -m kvpolicy.runtimes.hf.lm_eval run --model kvpolicy --model_args pretrained=...,policy=rkv``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as missing:
    if missing.name != "lm_eval":
        raise
    said = "kvpolicy.runtimes.hf.lm_eval needs lm-eval; install it with: pip install 'kvpolicy[lm-eval]'."
    raise (SystemExit(f"error: {said}") if __name__ == "__main__" else ImportError(said)) from None

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.spec import load


@register_model("kvpolicy")
class PolicyLM(HFLM):
    """`HFLM` under a policy.

    Generation goes through a `PolicyCache`. A likelihood is that of the policy too: the context is a prompt, and the
    continuation is then fed token by token, as if it had been generated, so that compactions happen when they would.
    Choices that share a context share its prefill.

    Args:
        policy: name or file of the policy.
        budget: entries per head, or a share of the tokens seen; what the policy says if None.
        **options: those of `HFLM`; ``pretrained`` above all.

    Raises:
        SpecError: the policy is not valid.
        UnsupportedError: the model cannot run under it.
    """

    def __init__(self, *, policy: str, budget: float | None = None, **options: Any) -> None:
        self.spec = load(policy, budget=budget)
        super().__init__(**options)
        if self.backend != "causal":
            raise UnsupportedError(f"backend: {self.backend!r} models have no cache to evict from; use a decoder.")
        PolicyCache(self.spec, self.model).close()  # refused now, not after the first batch

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        for name in ("num_beams", "num_return_sequences"):
            if options.get(name, 1) != 1:
                raise UnsupportedError(f"{name}: {options[name]} is not supported by this wrapper; leave it out.")
        with PolicyCache(self.spec, self.model) as cache:
            cache.prefill_chunks(context, options.get("attention_mask"))
            tokens: Tensor = super()._model_generate(context, max_length, stop, **passing(cache), **options)
            return tokens

    def _model_call(self, *args: Any, **options: Any) -> Tensor:
        raise UnsupportedError("a whole text in one forward pass follows no policy; use the likelihood requests.")

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether greedy decoding gives it) for each request."""
        from rich.progress import track

        answers: list[tuple[float, bool]] = []
        prompt: list[int] = []
        cache: PolicyCache | None = None
        first = torch.empty(0)
        quiet = disable_tqdm or self.rank != 0
        for key, context, continuation in track(requests, "likelihoods", disable=quiet):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            cut = len(tokens) - len(continuation)
            if not continuation or cut < 1:
                raise UnsupportedError(
                    f"a continuation of {len(continuation)} tokens leaves no room for its context within "
                    f"max_length={self.max_length}; shorten it."
                )
            if cache is None or tokens[:cut] != prompt:
                if cache is not None:
                    cache.close()
                prompt, cache = tokens[:cut], PolicyCache(self.spec, self.model)
                first = self._read(cache, prompt)
            with cache.fork() as own:
                logits = [first, *(self._step(own, token) for token in tokens[cut:-1])]
            answers.append(self._answer(torch.stack(logits), continuation))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        if cache is not None:
            cache.close()
        return answers

    def _read(self, cache: PolicyCache, prompt: list[int]) -> Tensor:
        """Fill the cache with a prompt and return the logits `[V]` of what follows."""
        ids = torch.tensor([prompt], device=self.device)
        cache.prefill_chunks(ids)
        rest = ids[:, cache.get_seq_length() :]
        return self._logits(cache, rest)

    def _step(self, cache: PolicyCache, token: int) -> Tensor:
        return self._logits(cache, torch.tensor([[token]], device=self.device))

    def _logits(self, cache: PolicyCache, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=True, **passing(cache, self.model.forward)).logits
        return logits[0, -1].float()

    @staticmethod
    def _answer(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
        wanted = torch.tensor(continuation, device=logits.device)
        likelihood = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
        return float(likelihood), bool((logits.argmax(-1) == wanted).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
