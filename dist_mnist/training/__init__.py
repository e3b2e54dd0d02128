"""The step and what surrounds it."""
