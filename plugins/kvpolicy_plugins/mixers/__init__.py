"""Mixers: importance and redundancy to one retention score."""
