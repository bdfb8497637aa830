"""Gates on hidden states, trained on a frozen model: KVzap's regression and TRIM-KV's distillation, in small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.attach import attach
from kvpolicy.runtimes.hf.attention import attention_modules
from kvpolicy.runtimes.hf.calibration.watching import Attended, check, watch
from kvpolicy.runtimes.hf.handover import AttentionFunction, mark
from kvpolicy.runtimes.hf.hidden import hidden_states, leave_hidden_states
from kvpolicy.runtimes.hf.model_facts import head_shapes
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.tables import gate_of

NEAR: Final = 32
"""Tokens behind an entry whose attention does not count: protections keep what is near anyway."""
RIDGE: Final = 1.0
"""Weight of the squared length of a direction in the regression, as in KVzap's code."""
WIDTH: Final = 16
"""Numbers between the two maps of a trained retention gate."""
CAPACITY: Final = 64
"""Entries per head that the retentions of a text should add up to at most."""
_EPOCHS: Final = 12
_RATE: Final = 5e-3
_BIAS: Final = 4.0  # a beta of 0.98: half of an entry's worth is left after 38 tokens
_BLOCK: Final = 64  # queries whose weights are looked at together


def score_gates(model: PreTrainedModel, chunks: Iterable[Tensor], horizon: int) -> dict[str, Tensor]:
    """Return a linear gate for each layer that predicts the logarithm of the largest later attention to a token.

    The target of a token and KV head is the largest of ``a |W_o v| / |x|`` over the later queries at least `NEAR`
    tokens behind it and the query heads of the group: `a` the attention weight, `v` the value, `x` the hidden state of
    the query's token (arXiv:2601.07891, equation 3). Tokens with less than `horizon` tokens behind them take no part.
    Ridge regression in closed form, in fp64.

    Args:
        model: a decoder whose layers all have full attention.
        chunks: int64 `[N]` each.
        horizon: tokens at the end of a chunk that are only looked from.

    Returns:
        ``output_weight`` `[L, H, E]` and ``output_bias`` `[L, H]`.
    """
    moments: dict[int, tuple[Tensor, Tensor]] = {}

    def look(seen: Attended) -> None:
        states = seen.hidden_states()
        count = len(states) - horizon
        targets = _later_attention(seen, states, count).log()
        inputs = functional.pad(states[:count], (0, 1), value=1.0).double().cpu()
        own = inputs.T @ inputs, inputs.T @ targets.T.double().cpu()
        before = moments.get(seen.layer)
        moments[seen.layer] = own if before is None else (before[0] + own[0], before[1] + own[1])

    for chunk in chunks:
        watch(model, chunk, look)
    weights, biases = [], []
    for _, (square, mixed) in sorted(moments.items()):
        total, size = square[-1, -1], len(square) - 1
        mean, level = square[-1, :-1] / total, mixed[-1] / total
        spread = square[:-1, :-1] - total * torch.outer(mean, mean)
        shared = mixed[:-1] - total * torch.outer(mean, level)
        solved = torch.linalg.solve(spread + RIDGE * torch.eye(size, dtype=spread.dtype), shared)
        weights.append(solved.T.float())
        biases.append((level - mean @ solved).float())
    return {"output_weight": torch.stack(weights), "output_bias": torch.stack(biases)}


def _later_attention(seen: Attended, states: Tensor, count: int) -> Tensor:
    """Return the targets of the first `count` tokens before the logarithm, fp32 `[H, count]`, above 0."""
    written = torch.einsum("hnd,hgdm->hgnm", seen.values[:, :count], seen.output_projection())
    sizes = torch.linalg.vector_norm(written, dim=-1)
    lengths = torch.linalg.vector_norm(states, dim=-1)
    most = torch.full(sizes.shape, torch.finfo(torch.float32).tiny, device=states.device)
    places = torch.arange(len(states), device=states.device)
    for at in places[NEAR:].split(_BLOCK):
        weights = seen.weights(at)[..., :count] / lengths[at, None]
        far = places[:count] <= at[:, None] - NEAR
        most = torch.maximum(most, (weights * far).amax(2) * sizes)
    return most.amax(1)


def retention_gates(
    model: PreTrainedModel, chunks: Sequence[Tensor], seed: int, progress: Callable[[int], object]
) -> dict[str, Tensor]:
    """Return a gate of two maps for each layer, trained so that a model whose attention forgets writes the same.

    Everything but the gates is frozen. The student's logits of a query at `t` get ``(t - i) log(beta_i)`` added, and
    what is minimised is the divergence of its next tokens from the model's own, and how far ``sum_i beta_i^(t - i)`` is
    above `CAPACITY`, as a share of it, averaged over queries, heads and layers (arXiv:2512.03324, section 4.2).

    Args:
        model: a decoder whose layers all have full attention.
        chunks: int64 `[N]` each; read several times.
        seed: of the first weights and the order of the chunks.
        progress: called with the number of runs still to come.

    Returns:
        ``hidden0_weight`` `[L, W, E]`, ``hidden0_bias``, ``output_weight`` `[L, H, W]` and ``output_bias``.
    """
    layers, draw = check(model), torch.Generator().manual_seed(seed)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        gates = _Gates(model, layers, draw)
        optimiser = torch.optim.Adam(gates.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS * len(chunks))
        for epoch in range(_EPOCHS):
            for at in torch.randperm(len(chunks), generator=draw).tolist():
                with torch.no_grad():
                    wanted = _next_tokens(model, chunks[at], None)[0]
                made, above = _next_tokens(model, chunks[at], gates)
                loss = functional.kl_div(made, wanted, reduction="batchmean", log_target=True) + above
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress((_EPOCHS - epoch) * len(chunks))
        progress(0)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return gates.tensors()


class _Gates(nn.Module):
    """Two maps for each layer with SiLU between them, by the names of a table of gates."""

    def __init__(self, model: PreTrainedModel, layers: int, draw: torch.Generator) -> None:
        super().__init__()
        config: Any = model.config.get_text_config(decoder=True)
        size, device = int(config.hidden_size), model.device
        heads = head_shapes(model, [0])[0][0]

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(device))

        self.hidden0_weight = drawn(layers, WIDTH, size)
        self.hidden0_bias = nn.Parameter(torch.zeros(layers, WIDTH, device=device))
        self.output_weight = drawn(layers, heads, WIDTH)
        self.output_bias = nn.Parameter(torch.full((layers, heads), _BIAS, device=device))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a table holds."""
        return {name: parameter.detach().cpu() for name, parameter in self.named_parameters()}

    def retained(self, layer: int, states: Tensor) -> Tensor:
        """Return the logarithm of what is left of each token at each later one, fp32 `[H, N, N]`; 0 above it."""
        own = {name: parameter[layer] for name, parameter in self.named_parameters()}
        kept = functional.logsigmoid(gate_of(own, states[None], "silu")[0])
        places = torch.arange(states.shape[0], device=states.device)
        age = (places[:, None] - places).clamp(min=0)
        return age * kept[:, None]


class _ForgettingLayer(DynamicLayer):
    """A layer whose attention sees each token with what a gate leaves of it, and notes how much that is."""

    def __init__(self, index: int, gates: _Gates) -> None:
        super().__init__()
        self.index, self.gates = index, gates
        self.above: Tensor | None = None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        mark(keys, self)
        return keys, values

    def attend(
        self,
        function: AttentionFunction,
        base: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to everything before, with the gate's logarithms added to the logits."""
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise UnsupportedError(
                f"{type(module).__name__} caps its logits or has attention sinks, with which retention gates cannot be "
                "trained here; choose another calibration."
            )
        heads, count = key.shape[1], key.shape[2]
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        retained = self.gates.retained(self.index, hidden_states(module, count)[0])
        seen = torch.ones(count, count, dtype=torch.bool, device=key.device).tril()
        held = (retained.exp() * seen).sum(-1)
        self.above = (functional.relu(held - CAPACITY) / CAPACITY).mean()
        logits = torch.einsum("hgqd,hnd->hgqn", query[0].float().unflatten(0, (heads, -1)), key[0].float()) * scale
        weights = (logits + retained[:, None]).masked_fill(~seen, -torch.inf).softmax(-1)
        output = torch.einsum("hgqn,hnd->qhgd", weights, value[0].float()).flatten(1, 2)
        return output[None].to(value.dtype), None


def _next_tokens(model: PreTrainedModel, tokens: Tensor, gates: _Gates | None) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of next tokens, fp32 `[N, V]`, and how far retentions are above the capacity."""
    if gates is None:
        logits = model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1), torch.zeros((), device=model.device)
    modules = attention_modules(model)
    layers = [_ForgettingLayer(index, gates) for index in range(len(modules))]
    undo = [attach(model, modules), leave_hidden_states(modules.values())]
    try:
        cache = Cache(layers=layers)
        made = model(input_ids=tokens[None].to(model.device), use_cache=True, **passing(cache, model.forward))
    finally:
        for each in undo:
            each()
    above = [layer.above for layer in layers if layer.above is not None]
    return made.logits[0].float().log_softmax(-1), torch.stack(above).mean()
