"""An exact, fast and restartable data-parallel trainer for small images in the idx (MNIST) format."""

__version__ = "0.1.0"
