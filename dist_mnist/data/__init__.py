"""The data pipeline: from idx files on disk to batches on a device."""
