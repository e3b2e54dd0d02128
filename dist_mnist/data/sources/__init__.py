"""Where data comes from: a folder, a download, or generated digits."""
