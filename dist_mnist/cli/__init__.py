"""The `dist-mnist` command."""
