"""A run on disk: its plan, its directory, its checkpoints, its records."""
