"""Checkpoints: their files, which of them a run keeps, and the chain of their digests."""
