"""A run: its plan, directory, checkpoints and records."""
