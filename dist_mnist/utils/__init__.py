"""What knows nothing of training."""
