"""Augmentation of whole batches on their device: each sample by random numbers of its own."""
