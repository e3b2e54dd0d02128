"""The training step, its metrics, and asynchronous saving."""
