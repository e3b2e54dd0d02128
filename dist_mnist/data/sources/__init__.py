"""Where data comes from: a folder, a download, generated digits."""
