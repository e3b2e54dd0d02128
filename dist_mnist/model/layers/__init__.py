"""Replacements for torch layers that compute the same for any number of ranks."""
