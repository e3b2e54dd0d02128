"""From idx files on disk to batches on a device."""
