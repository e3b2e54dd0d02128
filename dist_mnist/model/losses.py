"""Losses and the average of several predictions."""

import math
from typing import NamedTuple

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


class Targets(NamedTuple):
    """What the images of a batch show: labels (B,) int64, or mixtures of two with the first one's share, (B,)."""

    labels: torch.Tensor
    partners: torch.Tensor | None = None  # (B,) int64, the second labels
    shares: torch.Tensor | None = None  # (B,) float32 in [0, 1]

    def losses(self, logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy of each sample, (B,) float32, from logits (B, classes): of a mixture, that of its labels'."""
        losses = per_sample_loss(logits, self.labels, label_smoothing)
        if self.partners is None or self.shares is None:
            return losses
        return self.shares * losses + (1 - self.shares) * per_sample_loss(logits, self.partners, label_smoothing)

    def dominant(self) -> torch.Tensor:
        """The labels (B,) int64 that have the larger share."""
        if self.partners is None or self.shares is None:
            return self.labels
        return torch.where(self.shares >= 0.5, self.labels, self.partners)
