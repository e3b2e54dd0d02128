"""Checks that all ranks hold the same bits."""
