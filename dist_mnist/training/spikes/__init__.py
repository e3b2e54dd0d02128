"""Spikes of the loss or gradient norm: warnings, and steps computed again."""
