"""Label errors: find training samples whose label is probably wrong, for `dist-mnist data suspects`."""
