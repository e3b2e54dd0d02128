"""What listens to runs: the console, files, TensorBoard, and services that keep runs."""
