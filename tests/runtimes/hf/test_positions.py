"""How many positions a text may have, by what configurations say of their scaling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvpolicy.runtimes.shapes import positions_of


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 4096),
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),  # scaled already
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 2048}, 4096),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 4096),
    ],
)
def test_scaled_models_read_as_far_as_their_scaling_reaches(rope, positions):
    config = SimpleNamespace(max_position_embeddings=4096, rope_parameters=rope)
    assert positions_of(config) == positions


@pytest.mark.parametrize("limit", [None, -1, 0, "4096"])
def test_a_configuration_without_a_number_sets_no_limit(limit):
    assert positions_of(SimpleNamespace(max_position_embeddings=limit)) is None
