"""The settings of a run: declared, resolved, read from files."""
