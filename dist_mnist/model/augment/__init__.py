"""Augmentation of whole batches on their device, with counter-based random numbers for each sample."""
