"""Whether all ranks hold the same bits."""
