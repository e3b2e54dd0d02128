"""The data sets that have a name: how each is published, and how its files become idx files."""
