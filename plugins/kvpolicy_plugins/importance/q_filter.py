"""Keys along the direction that a head's queries share (Q-Filters)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.tables import TableOf, load_table
from kvpolicy.types import Scores


class QFilter(ImportanceScorer):
    """Projection ``k_i . f`` of each key, as cached, on its head's filter; the table says which way queries point.

    The filter is the first right singular vector of the head's queries on a calibration text, turned so that their
    projections are positive (section 3.2): a key along it is attended to whatever the query. O(N D), no queries.
    """

    paper: ClassVar[str] = "arXiv:2503.02812"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_heads": "every head has a filter of its own"}

    table: Annotated[str, TableOf("query_filters")]
    """Table of kind ``query_filters``: its name, or the path of its file."""

    def score(self, view: CacheView) -> Scores:
        filters = load_table(self.table, "query_filters").layer("filters", view)
        projection = torch.matmul(view.keys.float(), filters.unsqueeze(-1)).squeeze(-1)
        return torch.where(view.valid, projection, 0.0)
