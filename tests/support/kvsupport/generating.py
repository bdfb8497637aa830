"""Policies and what a full cache says, for tests of `generate`."""

from __future__ import annotations

ACCUMULATED = {"importance": "accumulated_attention", "mixer": "importance_only"}


STREAMING = {"importance": "recency", "mixer": "importance_only", "post": ["rerotate"], "trigger": "each_step"}


POLICIES = {"rkv": {}, "accumulated": ACCUMULATED, "re-rotated": STREAMING}
