"""The files that `kvpolicy new plugin` writes; ``@@name@@``, ``@@module@@`` and ``@@Class@@`` are filled in."""

from __future__ import annotations

from typing import Final

PYPROJECT: Final = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "@@name@@"
version = "0.1.0"
description = "Components and policies for kvpolicy"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["kvpolicy"]

[project.optional-dependencies]
test = ["kvpolicy[test]"]

[project.entry-points.kvpolicy]
@@name@@ = "@@module@@"

[tool.setuptools]
packages = ["@@module@@"]

[tool.setuptools.package-data]
@@module@@ = ["policies/*.yaml"]
"""

README: Final = """\
# @@name@@

A plugin for kvpolicy, which is installed first, in the same environment.

| kind | name | what it is |
|---|---|---|
| importance | `@@module@@_size` | large values matter; `order` chooses the norm |
| allocator | `@@module@@_slope` | later layers keep less; `ratio` says how much |
| policy | `@@name@@` | the scorer, with every head keeping the budget |
| policy | `@@name@@-slope` | the same with the allocator |

```
pip install -e ".[test]"
pytest                                        # the laws of every component and policy
kvpolicy list                                 # names this package
kvpolicy explain @@name@@
kvpolicy generate --policy @@name@@ "Why is the sky blue?"
```

In a policy file of your own:

```yaml
importance: {use: @@module@@_size, order: 2.0}
allocator: {use: @@module@@_slope, ratio: 0.5}
```

Counts that differ from layer to layer need a runtime that can hold them; one that cannot says so in a sentence.
"""

INIT: Final = """\
\"\"\"What this package brings to kvpolicy; the entry point in pyproject.toml names this module.\"\"\"

from __future__ import annotations

from pathlib import Path

from kvpolicy import hookimpl
from kvpolicy.loading.hookspecs import RegisterComponent, RegisterPolicy

kvpolicy_api = 1  # the plugin API that this is written for


@hookimpl
def kvpolicy_register_components(register: RegisterComponent) -> None:
    \"\"\"Register components: the names stand in policy files after `use:`.\"\"\"
    from @@module@@.allocator import @@Class@@Slope
    from @@module@@.scorer import @@Class@@Size

    register("@@module@@_size", @@Class@@Size)
    register("@@module@@_slope", @@Class@@Slope)


@hookimpl
def kvpolicy_register_policies(register: RegisterPolicy) -> None:
    \"\"\"Register every file of the folder policies under its own name.\"\"\"
    for path in sorted((Path(__file__).parent / "policies").glob("*.yaml")):
        register(path.stem, path)
"""

SCORER: Final = """\
\"\"\"An importance scorer: one fp32 number per cached entry, higher = keep.\"\"\"

from __future__ import annotations

import torch
from pydantic import Field

from kvpolicy import CacheView, ImportanceScorer
from kvpolicy.types import Scores


class @@Class@@Size(ImportanceScorer):
    \"\"\"Large values matter: what an entry can add to the output at most.\"\"\"

    order: float = Field(default=1.0, ge=1)
    \"\"\"Order of the norm: 1 sums magnitudes, 2 is the Euclidean length.\"\"\"

    def score(self, view: CacheView) -> Scores:
        \"\"\"Return `[B, H, N]`; slots that are not valid may hold anything, so they get a 0.\"\"\"
        size = torch.linalg.vector_norm(view.values.float(), self.order, dim=-1)
        return torch.where(view.valid, size, 0.0)
"""

ALLOCATOR: Final = """\
\"\"\"A budget allocator: how many entries each layer and KV head keeps; integers that sum exactly to the budget.\"\"\"

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.types import Counts


class @@Class@@Slope(BudgetAllocator):
    \"\"\"Later layers keep less.

    Every head pays a rising price for each further entry, `n / weight` for the n-th, and the cheapest are bought until
    the budget is spent: the sum is exact, and no head gets less than is protected or more than it has.
    \"\"\"

    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    ratio: float = Field(default=0.5, gt=0, le=1)
    \"\"\"What the last layer keeps, as a share of what the first one keeps; 1 is the same for all.\"\"\"

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        \"\"\"Return int64 `[B, H]` per layer with `protected <= count <= valid`.\"\"\"
        home, last = request.budget.device, max(request.num_layers - 1, 1)
        prices = []
        for layer, valid, protected in zip(request.layers, request.valid, request.protected, strict=True):
            weight = 1.0 - (1.0 - self.ratio) * layer / last
            n = torch.arange(1, int(valid.max()) + 1, device=home)
            price = (n / weight).expand(*valid.shape, -1)
            price = price.masked_fill(n <= protected.to(home)[..., None], 0.0)
            prices.append(price.masked_fill(n > valid.to(home)[..., None], math.inf))
        heads = sum(valid.shape[1] for valid in request.valid)
        have = sum(valid.to(home).sum(1) for valid in request.valid)
        total = torch.minimum(request.budget * heads, torch.as_tensor(have, device=home))
        order = torch.cat([price.flatten(1) for price in prices], 1).argsort(dim=1, stable=True)
        bought = order.argsort(dim=1) < total[:, None]
        parts = bought.split([price[0].numel() for price in prices], dim=1)
        return [
            part.view(price.shape).sum(-1).to(valid.device)
            for part, price, valid in zip(parts, prices, request.valid, strict=True)
        ]
"""

POLICY: Final = """\
schema_version: 1
policy: @@name@@
description: >-
  Keeps the entries with the largest values, and always the first four and the newest eight.
paper: ""
departures: []
budget: {tokens: 512}
phase: decode
trigger: {every: 64}
protect: {sinks: 4, recent: 8}
importance: {use: @@module@@_size, order: 1.0}
redundancy: none
mixer: importance_only
allocator: uniform
selector: {use: top_k, scope: head}
"""

SLOPED_POLICY: Final = """\
schema_version: 1
policy: @@name@@-slope
extends: @@name@@
description: As @@name@@, but later layers keep less.
allocator: {use: @@module@@_slope, ratio: 0.5}
"""

TESTS: Final = """\
\"\"\"Every law that holds for the components and policies of this package.\"\"\"

from @@module@@.allocator import @@Class@@Slope
from @@module@@.scorer import @@Class@@Size

from kvpolicy.testing import laws_of

test_laws = laws_of(@@Class@@Size, @@Class@@Slope, "@@name@@", "@@name@@-slope")
"""

FILES: Final = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "@@module@@/__init__.py": INIT,
    "@@module@@/scorer.py": SCORER,
    "@@module@@/allocator.py": ALLOCATOR,
    "@@module@@/policies/@@name@@.yaml": POLICY,
    "@@module@@/policies/@@name@@-slope.yaml": SLOPED_POLICY,
    "tests/test_laws.py": TESTS,
}
"""Relative path -> content."""
