"""Protections: slots that must stay, or go."""
