"""Samples whose label is probably wrong: what `dist-mnist data suspects` finds."""
