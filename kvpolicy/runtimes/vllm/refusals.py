"""What cannot be served, said before an engine starts: policies by their traits, engines by their options."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from kvpolicy.cache.paged import unserved_traits
from kvpolicy.contracts.components import NEEDS
from kvpolicy.errors import UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.vllm.hooks import missing

TESTED: Final = ((0, 32), (0, 33))
"""Versions of vLLM that kvpolicy was tested with: from the first, up to but without the second."""

SERVED: Final = frozenset({"queries", "attention", "query_stream", "query_statistics", "rope"})
"""The needs of components that this runtime can serve."""

_PLAIN: Final = ("auto", "float16", "bfloat16", "float32", "half", "float")


def policy_refusal(policy: Policy) -> str | None:
    """Return why a policy cannot be served by any engine, or None."""
    for trait, why in unserved_traits(policy).items():
        return f"policy {policy.name!r} cannot be served in vLLM (trait {trait}): {why}."
    unserved = sorted(policy.needs - SERVED)
    if unserved:
        return (
            f"policy {policy.name!r} needs {unserved[0]} ({NEEDS.get(unserved[0], 'not known')}), which vLLM does not "
            "give; choose another component."
        )
    return None


def start_refusal(policy: Policy) -> str | None:
    """Return why an engine is not started under a policy, and where those stand that are served, or None."""
    why = policy_refusal(policy)
    return (
        None if why is None else f"{why.removesuffix('.')}; docs/vllm-policies.md lists the policies that are served."
    )


def block_refusal(policy: Policy, block: int) -> str | None:
    """Return why a policy does not fit blocks of so many slots, with the nearest that does, or None."""
    numbers = {"budget": policy.budget.tokens}
    if policy.phase != "prefill":  # else there is one compaction, and no interval to the next
        numbers["trigger interval"] = getattr(policy.trigger, "interval", None)
    for name, number in numbers.items():
        if number is not None and number % block:
            near = max(round(number / block), 1) * block
            return (
                f"policy {policy.name!r}: {name} {number} is no multiple of the block size {block}, and blocks come "
                f"free whole; write {near}, or choose another --block-size."
            )
    return None


def version_refusal(version: str) -> str | None:
    """Return why a version of vLLM is refused, or None."""
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.partition("+")[0].split(".")[:2])
    if TESTED[0] <= numbers < TESTED[1]:
        return None
    low, high = ("{}.{}".format(*each) for each in TESTED)
    return (
        f"vLLM {version} is not among the versions that kvpolicy was tested with ({low} up to, not including, {high}); "
        "install one of those, or set `any_version` to true in kvpolicy's settings and compare its answers yourself."
    )


@lru_cache(maxsize=1)
def hooks_refusal(version: str, folder: Path) -> str | None:
    """Return what a version that was not tested, in a folder, lacks of what the plugin uses, or None."""
    lacking = missing(folder)
    if not lacking:
        return None
    name, says = next(iter(lacking.items()))
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return (
        f"vLLM {version} does not have what kvpolicy uses: {name} ({says}){more}; install one of the versions that "
        "kvpolicy was tested with."
    )


def engine_refusal(policy: Policy, config: Any) -> str | None:
    """Return why an engine's options cannot be served, or None.

    Args:
        policy: the policy.
        config: vLLM's VllmConfig.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    scheduler = config.scheduler_config
    said = [
        (config.speculative_config is not None,
         "speculative decoding takes tokens back after a compaction; leave --speculative-config out"),
        (cache.enable_prefix_caching,
         "prefix caching would share blocks that a compaction rewrites; start vLLM with --no-enable-prefix-caching"),
        (model.use_mla, "multi-head latent attention (MLA) keeps no keys and values per head; choose another model"),
        (str(cache.cache_dtype) not in _PLAIN,
         f"a KV cache of {cache.cache_dtype} is quantised and cannot be scored; leave --kv-cache-dtype at auto"),
        (_size(parallel, "decode_context_parallel_size") > 1 or _size(parallel, "prefill_context_parallel_size") > 1,
         "context parallelism (DCP, PCP) spreads one request's entries over ranks; use tensor parallelism"),
        (_size(parallel, "pipeline_parallel_size") > 1 and policy.selector.scope == "model",
         "scope 'model' needs the scores of all layers, and pipeline parallelism spreads them; write `scope: layer`"),
        (config.kv_transfer_config is not None,
         "a KV connector would carry blocks away that a compaction rewrites; leave --kv-transfer-config out"),
        (model.is_encoder_decoder or model.runner_type != "generate",
         "only decoders that generate text have a cache that grows; choose another model or --runner generate"),
        (getattr(parallel, "enable_dbo", False), "dual batch overlap splits a step in two; leave --enable-dbo out"),
        (getattr(cache, "kv_sharing_fast_prefill", False),
         "fast prefill skips queries that a policy may look at; leave --kv-sharing-fast-prefill out"),
        (_full_graphs(config),
         "full CUDA graphs keep lengths and block tables of their own; write -cc.cudagraph_mode=PIECEWISE"),
        (policy.prefill_chunk is not None and policy.phase != "decode"
         and scheduler.max_num_batched_tokens > policy.prefill_chunk,
         f"policy {policy.name!r} reads prompts in pieces; write --max-num-batched-tokens {policy.prefill_chunk}"),
    ]  # fmt: skip
    return next((f"kvpolicy in vLLM: {why}." for refused, why in said if refused), None)


def refuse(reason: str | None) -> None:
    """Raise UnsupportedError if there is a reason to."""
    if reason is not None:
        raise UnsupportedError(reason)


def _size(parallel: Any, name: str) -> int:
    return int(getattr(parallel, name, 1) or 1)


def _full_graphs(config: Any) -> bool:
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    return mode is not None and bool(mode.has_full_cudagraphs())
