"""The settings of a run: declaration, precedence, and configuration files."""
