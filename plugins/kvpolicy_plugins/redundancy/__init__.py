"""Redundancy scorers: how replaceable each entry is, higher = more replaceable."""
