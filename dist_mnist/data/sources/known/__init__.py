"""The known datasets: how each is published, and how its files become idx files."""
