"""Using trained networks: evaluation, prediction, export."""
