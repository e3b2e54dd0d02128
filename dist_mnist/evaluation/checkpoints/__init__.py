"""Checkpoints evaluated: their models, the images, the result."""
