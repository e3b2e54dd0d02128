"""Trained networks in use: evaluation, prediction, export."""
