"""Importance scorers: how much each entry matters, higher = keep."""
