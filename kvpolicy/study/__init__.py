"""Ablation studies: tasks, specifications, runs and reports."""
