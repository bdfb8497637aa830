"""Triggers: when a row is compacted."""
