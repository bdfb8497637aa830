"""What several tests of specifications need."""

from __future__ import annotations

import pytest

from kvpolicy import PolicySpec
from kvsupport.spec_shapes import RKV


@pytest.fixture
def rkv():
    return PolicySpec.from_yaml(RKV)
