"""Hyperparameter sweeps: every combination of some values (a grid), or a search."""
