"""Ranks: world, devices, process group, collectives."""
