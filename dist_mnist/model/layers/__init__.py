"""Layers that compute the same for any number of ranks, in place of torch's own."""
