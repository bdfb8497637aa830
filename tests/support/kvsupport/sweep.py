"""What becomes of a model class under a `PolicyCache`: served rightly, refused at construction, or a fault."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvpolicy
from kvpolicy import Policy
from kvpolicy.errors import CacheStateError, KVPolicyError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.rope import layer_ropes
from kvsupport.kept_mask import logits_under

POLICIES = (
    "rkv", "sinks-recent", "rkv-density", "snapkv-prefill", "h2o", "tova", "streaming-llm", "adakv-snapkv",
)  # fmt: skip
"""One per mechanism: queries, positions, un-rotated keys, a prompt, weights, the last query, turned keys, ragged."""

FEW = ("rkv", "streaming-llm", "adakv-snapkv")
"""A dense store, turned keys and a ragged store."""

_WHOLE = ("rkv", "adakv-snapkv")  # a dense and a ragged store: below the budget, and with padding
_PROMPT, _CHUNK, _AFTER = 20, 3, 3
_BUDGET = 12
_FAR = 3e-4  # of the size of the logits: measured differences are below 2e-5
_LIMIT = 48


@dataclass
class SweepOutcome:
    """What a sweep found out about one model."""

    model: str
    served: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untried: str | None = None  # why it cannot run at all


def small(name: str, budget: int = _BUDGET) -> Policy:
    """Return a registered policy at a budget of a few entries, its windows made to fit."""
    spec = kvpolicy.load(name)
    data = spec.to_data()
    changes: dict[str, Any] = {"budget": budget}
    if data["trigger"]["use"] == "every":
        changes["trigger.interval"] = 4
    for part, most in (("recent", 5), ("sinks", 2)):
        if data["protect"].get(part, {}).get("count", 0) > most:
            changes[f"protect.{part}"] = most
    if data["importance"].get("observe", 0) > 5:
        changes["importance.observe"] = 5
    return spec.replace(changes).build()


class _Replay:
    """A text that is fed to a model step by step; `visible` notes what each query could see."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, cache: Any) -> None:
        self.model, self.ids, self.cache = model, ids, cache
        self.at = 0
        self.logits: list[Tensor] = []
        self.visible: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.steps: list[int] = []

    @torch.no_grad()
    def feed(self, tokens: int) -> None:
        """Feed so many tokens; note what is held before them."""
        ours = isinstance(self.cache, PolicyCache)
        held = self._held() if ours and self.at else {}
        start, self.at = self.at, self.at + tokens
        self.steps.append(tokens)
        output = self.model(input_ids=self.ids[:, start : self.at], past_key_values=self.cache, use_cache=True)
        self.logits.append(output.logits[0].float())
        if not ours:
            return
        for layer, heads in self._heads().items():
            seen = self.visible.setdefault(layer, torch.zeros(heads, _LIMIT, _LIMIT, dtype=torch.bool))
            seen[:, start : self.at, start : self.at] = True  # the model's own mask is honoured besides
            for head in range(heads):
                seen[head, start : self.at, held.get(layer, [[]] * heads)[head]] = True

    def _heads(self) -> dict[int, int]:
        if not self.counts:
            for info in self.cache.stats().layers:
                heads = 0
                try:
                    while True:
                        self.cache.kept(info.layer_idx, heads)
                        heads += 1
                except CacheStateError:
                    self.counts[info.layer_idx] = heads
        return self.counts

    def _held(self) -> dict[int, list[list[int]]]:
        return {layer: [self.cache.kept(layer, h) for h in range(n)] for layer, n in self._heads().items()}

    def settled_now(self) -> bool:
        """Whether what is due has just run, so that a few tokens at once do not make another compaction due."""
        before = self.cache.stats().compactions
        self.feed(1)
        return bool(self.cache.stats().compactions > before)

    def lost(self) -> bool:
        """Whether anything was evicted."""
        return any(len(kept) < self.at for heads in self._held().values() for kept in heads)

    def forgotten_came_back(self) -> str | None:
        """Say where `kept` names an entry that the last query could not see; None if nowhere."""
        for layer, heads in self._held().items():
            for head, kept in enumerate(heads):
                if not bool(self.visible[layer][head, self.at - 1, kept].all()):
                    return f"layer {layer}, head {head} holds an entry again that it had evicted"
        return None

    def result(self) -> Tensor:
        """Return all logits so far, `[N, vocabulary]`."""
        return torch.cat(self.logits)


def _text(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, 100, (1, _LIMIT), generator=generator)


def _far(got: Tensor, wanted: Tensor) -> float:
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - wanted).abs().max() / wanted.std())


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def sweep(model: PreTrainedModel, policies: tuple[str, ...] = POLICIES) -> SweepOutcome:
    """Try a model with each policy.

    Args:
        model: in fp32 and evaluation mode, with a vocabulary of at least 100 tokens.
        policies: names of registered policies.
    """
    outcome = SweepOutcome(type(model).__name__)
    ids = _text(model)
    open_to: list[str] = []
    for name in policies:
        try:
            PolicyCache(small(name), model).close()
            open_to.append(name)
        except KVPolicyError as error:
            outcome.refused[name] = str(error)
        except Exception as error:  # noqa: BLE001  that is the fault
            outcome.faults.append(f"{name}: construction ends in {_said(error)}")
    if not open_to:
        return outcome
    native = _native(model, ids, outcome)
    if native is None:
        return outcome
    for name in open_to:
        try:
            fault = _above(model, ids, name, native)
            if name in _WHOLE:
                fault = fault or _below(model, ids, name, native) or _padded(model, ids, name, outcome)
        except Exception as error:  # noqa: BLE001  that is the fault
            fault = f"a forward pass ends in {_said(error)}"
        if fault is None:
            outcome.served.append(name)
        else:
            outcome.faults.append(f"{name}: {fault}")
    return outcome


@dataclass
class _Native:
    """What a model does by itself."""

    plain: Tensor  # logits of the whole text, `[N, vocabulary]`, or step by step where that is something else
    by_steps: bool
    chunks: bool  # whether several tokens at once may follow a cache


def _steps(model: PreTrainedModel, ids: Tensor, cache: Any, *, chunk: bool) -> Tensor:
    run = _Replay(model, ids, cache)
    for tokens in (_PROMPT, *[1] * 5, *([_CHUNK] if chunk else []), *[1] * (_LIMIT - _PROMPT - 5 - _CHUNK * chunk)):
        run.feed(tokens)
    return run.result()


def _native(model: PreTrainedModel, ids: Tensor, outcome: SweepOutcome) -> _Native | None:
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[0].float()
    except Exception as error:  # noqa: BLE001  whatever a model file raises
        outcome.untried = f"it takes no text alone ({_said(error)[:120]})"
        return None
    try:
        stepwise = _steps(model, ids, DynamicCache(config=model.config), chunk=False)
    except Exception as error:  # noqa: BLE001  whatever a model file raises
        outcome.faults.append(f"accepted, but the model does not run with a DynamicCache: {_said(error)}")
        return None
    by_steps = _far(stepwise, whole) > _FAR
    if by_steps:
        outcome.notes.append("with a DynamicCache the model computes something else than without; compared with that")
    plain = stepwise if by_steps else whole
    try:
        chunks = _far(_steps(model, ids, DynamicCache(config=model.config), chunk=True), plain) < _FAR
    except Exception:  # noqa: BLE001  likewise
        chunks = False
    if not chunks:
        outcome.notes.append("several tokens after the first pass are not right with a DynamicCache either")
    return _Native(plain, by_steps, chunks)


def _below(model: PreTrainedModel, ids: Tensor, name: str, native: _Native) -> str | None:
    with PolicyCache(small(name, 1000), model) as cache:
        got = _steps(model, ids, cache, chunk=native.chunks)
    off = _far(got, native.plain)
    return None if off < _FAR else f"below the budget it differs from the plain model by {off:.1g}"


def _above(model: PreTrainedModel, ids: Tensor, name: str, native: _Native) -> str | None:
    turns = "rerotate" in str(kvpolicy.load(name).to_data().get("post"))
    with PolicyCache(small(name), model) as cache:
        run = _Replay(model, ids, cache)
        run.feed(_PROMPT)
        for _ in range(6):
            run.feed(1)
        if native.chunks:
            for _ in range(5):
                if run.settled_now():
                    break
            run.feed(_CHUNK)
        for _ in range(_AFTER):
            run.feed(1)
        got, lost = run.result(), run.lost()
        back = run.forgotten_came_back()
    if back:
        return back
    if not lost:
        return "nothing was evicted above the budget"
    n = run.at
    visible = {layer: seen[:, :n, :n] for layer, seen in run.visible.items()}
    ropes = layer_ropes(model, list(visible)) if turns else {}
    steps = run.steps if native.by_steps else ()
    wanted = logits_under(model, ids[:, :n], visible, ropes, steps)
    if (off := _far(got, wanted)) > _FAR:
        blind = _far(logits_under(model, ids[:, :n], {}, {}, steps), native.plain[:n])
        where = int(((got - wanted).abs().amax(-1) / wanted.std() > _FAR).nonzero()[0])
        return f"after evictions it differs from the masked run by {off:.1g} from token {where} on (oracle {blind:.1g})"
    if _far(wanted, native.plain[:n]) < 10 * _FAR:
        return "evictions make no difference, so that nothing is proved"
    return None


def _rows(model: PreTrainedModel, rows: list[Tensor], following: list[Tensor], cache: Any) -> list[Tensor]:
    """Feed left-padded rows and then one token of each at a time; return each row's logits of the new tokens."""
    width = max(row.shape[0] for row in rows)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    ids = torch.stack([torch.cat([torch.zeros(width - r.shape[0], dtype=torch.long), r]) for r in rows])
    mask = torch.stack([(torch.arange(width) >= width - r.shape[0]).long() for r in rows])
    logits: list[Tensor] = []
    with torch.no_grad():
        for step in range(len(following[0]) + 1):
            more: dict[str, Any] = {}
            if takes_positions:
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
            logits.append(output.logits[:, -1].float())
            if step < len(following[0]):
                ids = torch.stack([tokens[step : step + 1] for tokens in following])
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
    return [torch.stack([each[i] for each in logits]) for i in range(len(rows))]


def _padded(model: PreTrainedModel, ids: Tensor, name: str, outcome: SweepOutcome) -> str | None:
    rows, following = [ids[0, :20], ids[0, 5:18]], [ids[0, 20:27], ids[0, 30:37]]
    note = "a left-padded batch is not right with a DynamicCache either"
    if note in outcome.notes:
        return None
    if not outcome.served:
        try:
            together = _rows(model, rows, following, DynamicCache(config=model.config))
            alone = [
                _rows(model, [r], [f], DynamicCache(config=model.config))[0]
                for r, f in zip(rows, following, strict=True)
            ]
            right = all(_far(a, b) < _FAR for a, b in zip(together, alone, strict=True))
        except Exception:  # noqa: BLE001  whatever a model file raises
            right = False
        if not right:
            outcome.notes.append(note)
            return None
    policy = small(name)
    with PolicyCache(policy, model) as cache:
        together = _rows(model, rows, following, cache)
        layers = [info.layer_idx for info in cache.stats().layers]
        held = [[cache.kept(layer, 0, row) for layer in layers] for row in range(2)]
    for row, (tokens, more) in enumerate(zip(rows, following, strict=True)):
        with PolicyCache(policy, model) as cache:
            [alone_logits] = _rows(model, [tokens], [more], cache)
            kept = [cache.kept(layer, 0) for layer in layers]
        if kept != held[row]:
            return f"row {row} of a padded batch keeps other entries than alone"
        if (off := _far(together[row], alone_logits)) > _FAR:
            return f"row {row} of a padded batch differs by {off:.1g} from the row alone"
    return None
