"""Evaluation of checkpoints: their models, the split, the result."""
