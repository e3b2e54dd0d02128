"""Listeners: the console, metrics.jsonl, TensorBoard, trackers (MLflow, W&B) and Kubeflow Trainer."""
