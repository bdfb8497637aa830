"""Selectors: scores and counts to slots."""
