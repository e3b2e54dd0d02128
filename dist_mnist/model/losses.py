"""Losses and the average of several predictions."""

import math

import torch
from torch.nn import functional as F


def average_predictions(logits: list[torch.Tensor]) -> torch.Tensor:
    """Logits (B, classes) float64 of the mean of the probabilities; of a single prediction, its own logits."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.double().log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))


def per_sample_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy of each sample, (B,) float32, from logits (B, classes) and labels (B,) int64."""
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
