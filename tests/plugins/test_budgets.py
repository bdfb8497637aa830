"""Allocators against their formulas in plain Python, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.contracts.components import AllocationRequest
from kvpolicy.errors import KVPolicyError, SpecError, TableError
from kvpolicy.tables import Table, save_table


def make(name, **params):
    return kvpolicy.catalog().get("allocator", name)(**params)


def request(budget, valid, protected=None, *, scores=None, seed=0, layers=None):
    """A request about rows of layers of heads (lists `[L][B][H]`); protected slots and holes lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    protected = [[[0] * len(row) for row in layer] for layer in valid] if protected is None else protected
    slots = 2 + max(n for layer in valid for row in layer for n in row)
    masks, kept, drawn = [], [], []
    for held, stays in zip(valid, protected, strict=True):
        mask = torch.zeros(len(held), len(held[0]), slots, dtype=torch.bool)
        stay = mask.clone()
        for b, row in enumerate(held):
            for h, n in enumerate(row):
                at = torch.randperm(slots, generator=generator)[:n]
                mask[b, h, at] = True
                stay[b, h, at[: stays[b][h]]] = True
        score = torch.rand(mask.shape, generator=generator)
        masks.append(mask)
        kept.append(stay)
        drawn.append(score)
    drawn = drawn if scores is None else scores
    layers = list(range(len(valid))) if layers is None else layers
    return AllocationRequest(
        budget=torch.tensor(budget),
        valid=[m.sum(-1) for m in masks],
        protected=[k.sum(-1) for k in kept],
        scores=[s.masked_fill(~m, float("nan")) for s, m in zip(drawn, masks, strict=True)],
        masks=masks,
        layers=layers,
        num_layers=max(layers) + 1,
        protected_masks=kept,
    )


def checked(allocator, asked):
    """Allocate; every count lies within its bounds, and every row adds up."""
    counts = allocator.allocate(asked)
    assert all(c.dtype == torch.int64 for c in counts)
    for got, held, stays in zip(counts, asked.valid, asked.protected, strict=True):
        assert ((stays <= got) & (got <= held)).all(), (stays, got, held)
    heads = sum(v.shape[1] for v in asked.valid)
    want = torch.minimum(asked.budget * heads, sum(v.sum(1) for v in asked.valid))
    assert torch.equal(sum(c.sum(1) for c in counts), want)
    return [c.tolist() for c in counts]


@pytest.fixture
def tables(tmp_path):
    """Write a table of 4 layers of 2 heads and return its path; `head_scores` if no curves are given."""

    def write(scores=None, curves=None):
        tensors = {"scores": torch.tensor(scores)} if curves is None else curves
        kind = "head_scores" if curves is None else "head_curves"
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_table(Table(kind, "test", "by-hand", 4, 2, 8, tensors), path)
        return str(path)

    return write


SCORES = [[0.1, 0.9], [0.4, 0.2], [0.0, 0.8], [0.3, 0.7]]
KEPT = torch.stack([0.5 * torch.tensor(SCORES), torch.tensor(SCORES).flip(0)])
CURVES = {"fractions": KEPT.mean((1, 2)), "kept": KEPT}  # fractions 0.2125 and 0.425


@pytest.fixture(params=["pyramid", "adaptive_heads", "global_pool", "table", "table_gate", "table_curve", "z_score"])
def allocator(request, tables):
    name = request.param
    if name == "z_score":
        return make("global_pool", normalise="z_score")
    if name.startswith("table"):
        return make(name, table=tables(curves=CURVES) if name == "table_curve" else tables(SCORES))
    return make(name)


@pytest.mark.parametrize("seed", range(20))
def test_every_row_adds_up_and_is_shared_as_if_alone(allocator, seed):
    """Rows of different lengths, heads with next to nothing, more protected than a share."""
    generator = torch.Generator().manual_seed(seed)
    alike = allocator.counts == "per_layer"
    valid = torch.randint(0, 40, (4, 3, 1 if alike else 2), generator=generator).expand(4, 3, 2)
    protected = (valid * torch.rand(4, 3, 2, generator=generator).square()).long()
    budget = protected.amax((0, 2)) + torch.randint(0, 12, (3,), generator=generator)
    asked = request(budget.clamp(min=1).tolist(), valid.tolist(), protected.tolist(), seed=seed)
    together = checked(allocator, asked)
    if alike:
        assert all(len(set(row)) == 1 for layer in together for row in layer)
    for b in range(3):
        parts = {
            name: [t[b : b + 1] for t in getattr(asked, name)]
            for name in ("valid", "protected", "scores", "masks", "protected_masks")
        }
        alone = replace(asked, budget=asked.budget[b : b + 1], **parts)
        assert checked(allocator, alone) == [[layer[b]] for layer in together]


def test_golden_g4():
    """PyramidKV with B - w = 10, four layers and beta 5: 18, 12.667, 7.333, 2 by largest remainder."""
    held = [[[100, 100], [50, 50]]] * 4
    window = [[[8, 8], [3, 3]]] * 4
    counts = checked(make("pyramid", beta=5.0), request([18, 13], held, window))
    assert [layer[0] for layer in counts] == [[26, 26], [21, 21], [15, 15], [10, 10]]
    assert [layer[1] for layer in counts] == [[21, 21], [16, 16], [10, 10], [5, 5]]


@pytest.mark.parametrize(("layers", "budget", "beta"), [(30, 128, 20.0), (32, 64, 20.0), (80, 128, 20.0), (7, 33, 1.0)])
def test_pyramid_is_the_papers_line_to_within_one_entry(layers, budget, beta):
    window, k = 8, budget - 8
    counts = checked(make("pyramid", beta=beta), request([budget], [[[999]]] * layers, [[[window]]] * layers))
    first, last = 2 * k - k / beta, k / beta
    for i, ((count,),) in enumerate(counts):
        assert abs(count - window - (first - (first - last) / (layers - 1) * i)) < 1
    every = [count for ((count,),) in counts]
    assert every == sorted(every, reverse=True)


def test_pyramid_gives_what_a_short_prompt_leaves_to_the_other_layers():
    counts = checked(make("pyramid", beta=5.0), request([18], [[[20]]] * 4, [[[8]]] * 4))
    # 12 of the wanted 18 are there; the other 28 go by 12.67 : 7.33 : 2, of which 12 is the most again.
    assert counts == [[[20]], [[20]], [[20]], [[12]]]
    assert checked(make("pyramid"), request([18], [[[18]]])) == [[[18]]]


def test_pyramid_adds_up_when_layers_have_other_heads_and_heads_other_entries():
    """18 and 2 per head would be 38 entries instead of 30; heads that hold less leave the rest to the others."""
    assert checked(make("pyramid", beta=5.0), request([10], [[[99, 99]], [[99]]])) == [[[14, 14]], [[2]]]
    counts = checked(make("pyramid", beta=5.0), request([10], [[[30, 6]], [[30, 30]]]))
    assert counts[0][0][1] == 6
    assert counts[0][0][0] > counts[1][0][0] == counts[1][0][1]


def adakv(scores, masks, protected, free, floor, heads):
    """The common ranking of one row by hand; of equal scores the lowest slot, then the first head."""
    entries = [(h, n) for h in range(heads) for n in masks[h].nonzero()[:, 0].tolist() if not protected[h, n]]
    best = sorted(entries, key=lambda e: (-float(scores[e[0], e[1]]), e[1], e[0]))[:free]
    return [(1 - floor) * sum(h == e[0] for e in best) + floor * free / heads for h in range(heads)]


def rounded(shares):
    whole = [int(x + 1e-9) for x in shares]
    order = sorted(range(len(shares)), key=lambda i: (-round(shares[i] - whole[i], 6), i))
    return [n + (i in order[: round(sum(shares)) - sum(whole)]) for i, n in enumerate(whole)]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_adaptive_heads_equals_the_ranking_by_hand(floor):
    held, window = [[[60, 60, 60]] * 2] * 2, [[[4, 4, 4], [2, 2, 2]]] * 2
    asked = request([20, 14], held, window, seed=3)
    # Half the numbers tie, and head 0 has the higher ones.
    scores = [((s * 8).round() / 8 + torch.tensor([0.25, 0, 0])[:, None]) for s in asked.scores]
    asked = replace(asked, scores=scores)
    counts = checked(make("adaptive_heads", floor=floor), asked)
    for layer in range(2):
        for b, budget in enumerate((20, 14)):
            stays = window[layer][b][0]
            parts = (asked.scores[layer][b], asked.masks[layer][b], asked.protected_masks[layer][b])
            expected = rounded(adakv(*parts, 3 * (budget - stays), floor, 3))
            assert counts[layer][b] == [stays + n for n in expected]
    assert (counts[0][0] == [20] * 3) == (floor == 1.0)


def test_a_layer_keeps_its_budget_and_a_pool_may_not():
    """Scores of the second layer are higher: in one pool it takes everything, by layers it takes its half."""
    asked = request([5], [[[20, 20]]] * 2)
    asked = replace(asked, scores=[asked.scores[0], asked.scores[1] + 1])
    by_layer = checked(make("adaptive_heads"), asked)
    assert [sum(layer[0]) for layer in by_layer] == [10, 10]
    pooled = checked(make("global_pool"), asked)
    assert [sum(layer[0]) for layer in pooled] == [0, 20]
    every = torch.cat([s.flatten() for s in asked.scores]).nan_to_num(-1)
    cut = every.sort(descending=True).values[19]
    assert pooled == [(s >= cut).sum(-1).tolist() for s in asked.scores]
    assert checked(make("global_pool", floor=1.0), asked) == [[[5, 5]]] * 2
    assert [sum(layer[0]) for layer in checked(make("global_pool", floor=0.5), asked)] == [5, 15]


def test_protected_entries_do_not_compete():
    """The entries with the highest scores are protected in head 0; they earn it nothing."""
    held, window = [[[10, 10]]], [[[4, 0]]]
    asked = request([5], held, window, seed=5)
    raised = [s + 9 * k for s, k in zip(asked.scores, asked.protected_masks, strict=True)]
    for name in ("adaptive_heads", "global_pool"):
        allocator = make(name, floor=0.0)
        assert checked(allocator, replace(asked, scores=raised)) == checked(allocator, asked)


def test_normalisation_makes_heads_comparable():
    """Another unit and another zero for each head change nothing under `z_score`, and much without it."""
    asked = request([8, 6], [[[30, 30], [30, 25]]] * 2, seed=7)
    other = replace(asked, scores=[s * torch.tensor([[0.01], [50.0]]) - 7 for s in asked.scores])
    for name in ("adaptive_heads", "global_pool"):
        z_score = make(name, normalise="z_score")
        assert z_score.normalises
        assert not make(name, normalise="concentration").normalises
        assert checked(z_score, asked) == checked(z_score, other)
        assert checked(make(name), asked) != checked(make(name), other)


def test_concentration_scales_by_the_mass_of_the_top():
    """Two heads with equal sums: the one whose two best entries hold 0.9 of it outranks the flat one (0.5)."""
    scores = torch.tensor([[[0.45, 0.45, 0.06, 0.04], [0.25, 0.25, 0.25, 0.25]]])
    asked = request([2], [[[4, 4]]])
    asked = replace(asked, scores=[scores], masks=[torch.ones(1, 2, 4) > 0], protected_masks=[torch.zeros(1, 2, 4) > 0])
    assert checked(make("adaptive_heads", floor=0.0), asked) == [[[2, 2]]]
    flat = replace(asked, scores=[scores * torch.tensor([[0.3], [1.0]])])
    assert checked(make("adaptive_heads", floor=0.0), flat) == [[[0, 4]]]
    # 0.135 * 0.9 = 0.1215 against 0.25 * 0.5 = 0.125; with 0.32 it is 0.1296.
    concentrated = make("adaptive_heads", floor=0.0, normalise="concentration")
    assert checked(concentrated, flat) == [[[0, 4]]]
    assert checked(concentrated, replace(asked, scores=[scores * torch.tensor([[0.32], [1.0]])])) == [[[2, 2]]]


@pytest.mark.parametrize(("beta", "temperature"), [(1.5, 1.0), (1.01, 1.0), (3.0, 2.0)])
def test_table_is_headkvs_formula(tables, beta, temperature):
    window, budget = 8, 128
    asked = request([budget], [[[999, 999]]] * 4, [[[window] * 2]] * 4)
    counts = checked(make("table", table=tables(SCORES), beta=beta, temperature=temperature), asked)
    weights = [s**temperature for layer in SCORES for s in layer]
    pool = (budget - window) * 8 / beta
    least = (budget - window) * (1 - 1 / beta)
    expected = rounded([w / sum(weights) * pool + least for w in weights])
    assert [n for layer in counts for n in layer[0]] == [window + n for n in expected]


def test_table_of_some_layers_of_a_model(tables):
    """A model that evicts from layers 1 and 3 only looks up those."""
    asked = request([10], [[[99, 99]]] * 2, layers=[1, 3])
    counts = checked(make("table", table=tables(SCORES), beta=1.0), asked)
    assert counts == [[[10, 5]], [[8, 17]]]  # 40 entries by 4 : 2 : 3 : 7


def test_retrieval_heads_keep_what_streaming_heads_leave(tables):
    gate = make("table_gate", table=tables(SCORES), retrieval=0.5)  # 0.9, 0.8, 0.7 and 0.4
    stays = [[[12, 12]]] * 4
    counts = checked(gate, request([50], [[[100, 100]]] * 4, stays))
    assert counts == [[[12, 88]], [[88, 12]], [[12, 88]], [[12, 88]]]
    # A budget that retrieval heads cannot use up goes to the windows of the others.
    counts = checked(gate, request([60], [[[100, 100]]] * 4, stays))
    assert counts == [[[20, 100]], [[100, 20]], [[20, 100]], [[20, 100]]]
    one = make("table_gate", table=tables(SCORES), retrieval=0.01)
    assert checked(one, request([20], [[[100, 100]]] * 4, stays)) == [[[12, 76]], *[[[12, 12]]] * 3]


@pytest.mark.parametrize(("budget", "along"), [(850, 0.0), (400, 0.0), (1275, 0.5), (1700, 1.0), (1800, 1.0)])
def test_curves_are_interpolated(tables, budget, along):
    """Heads of 4,000 entries, so that the two measured budgets are 850 and 1,700."""
    counts = checked(make("table_curve", table=tables(curves=CURVES)), request([budget], [[[4000, 4000]]] * 4))
    wanted = ((1 - along) * KEPT[0] + along * KEPT[1]).flatten()
    expected = (wanted / wanted.sum() * budget * 8).tolist()
    for layer, head in [(a, b) for a in range(4) for b in range(2)]:
        assert abs(counts[layer][0][head] - expected[2 * layer + head]) < 1


def test_missing_uniform_and_foreign_tables_are_refused(tables, tmp_path):
    for name in ("table", "table_gate"):
        with pytest.raises(ValueError, match="there is no such file"):
            make(name, table=str(tmp_path / "absent.safetensors"))
        with pytest.raises(ValueError, match="is of kind 'head_curves'"):
            make(name, table=tables(curves=CURVES))
        with pytest.raises(TableError, match="uniform"):
            tables([[0.5, 0.5]] * 4)
        with pytest.raises(TableError, match="does not fit"):
            make(name, table=tables(SCORES)).allocate(request([4], [[[9, 9, 9]]] * 4))
    with pytest.raises(ValueError, match="is of kind 'head_scores'"):
        make("table_curve", table=tables(SCORES))


SPEC = """
schema_version: 1
policy: mine
budget: {tokens: 64}
trigger: {every: 8}
importance: IMPORTANCE
allocator: ALLOCATOR
selector: {use: top_k, scope: SCOPE}
"""


@pytest.mark.parametrize(
    ("importance", "allocator", "scope", "message"),
    [
        ("key_norm", "adaptive_heads", "head", "key_norm are not comparable across heads"),
        ("key_norm", "{use: adaptive_heads, normalise: concentration}", "head", "not comparable across heads"),
        ("window_attention", "global_pool", "head", "window_attention are not comparable across layers"),
        ("window_attention", "adaptive_heads", "layer", "selector.scope: 'layer'"),
        ("window_attention", "adaptive_heads", "model", "selector.scope: 'model'"),
        ("window_attention", "pyramid", "model", "selector.scope: 'model'"),
        ("window_attention", "{use: table, table: no/such}", "head", "no/such"),
        ("window_attention", "{use: table_gate}", "head", "table"),
        ("window_attention", "{use: pyramid, beta: 0.5}", "head", "beta"),
        ("window_attention", "{use: adaptive_heads, floor: 1.5}", "head", "floor"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_spec_is_loaded(importance, allocator, scope, message):
    text = SPEC.replace("IMPORTANCE", importance).replace("ALLOCATOR", allocator).replace("SCOPE", scope)
    with pytest.raises(KVPolicyError) as caught:
        kvpolicy.PolicySpec.from_yaml(text).build()
    assert isinstance(caught.value, SpecError)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("importance", "allocator", "scope"),
    [
        ("key_norm", "{use: adaptive_heads, normalise: z_score}", "head"),
        ("key_norm", "{use: global_pool, normalise: z_score}", "head"),
        ("window_attention", "adaptive_heads", "head"),
        ("random", "global_pool", "head"),
        ("key_norm", "pyramid", "layer"),
    ],
)
def test_what_fits_is_built(importance, allocator, scope):
    text = SPEC.replace("IMPORTANCE", importance).replace("ALLOCATOR", allocator).replace("SCOPE", scope)
    assert kvpolicy.PolicySpec.from_yaml(text).build().counts != "equal"
