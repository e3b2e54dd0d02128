"""Checkpoints: their files, retention, and the chain of their digests."""
