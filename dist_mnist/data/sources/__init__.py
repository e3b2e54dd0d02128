"""Sources of data: a folder, a download, or generated digits."""
