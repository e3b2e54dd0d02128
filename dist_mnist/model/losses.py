"""Losses, targets of mixed images, and averaged predictions."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F


def average_predictions(logits: list[torch.Tensor]) -> torch.Tensor:
    """Return logits (B, classes) float64 of the mean of the probabilities; a single prediction's logits unchanged."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.double().log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))


def per_sample_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return each sample's cross entropy, (B,) float32, from logits (B, classes) and labels (B,) int64."""
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


class Targets(NamedTuple):
    """The targets of a batch: labels (B,) int64; of mixed images, also the partners' labels and the labels' weights."""

    labels: torch.Tensor
    partners: torch.Tensor | None = None  # (B,) int64, the partners' labels
    shares: torch.Tensor | None = None  # (B,) float32 in [0, 1], the weights of the first labels

    def losses(self, logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return each sample's cross entropy, (B,) float32, from logits (B, classes); weighted over mixed labels."""
        losses = per_sample_loss(logits, self.labels, label_smoothing)
        if self.partners is None or self.shares is None:
            return losses
        return self.shares * losses + (1 - self.shares) * per_sample_loss(logits, self.partners, label_smoothing)

    def dominant(self) -> torch.Tensor:
        """Return the labels (B,) int64 with the larger weight."""
        if self.partners is None or self.shares is None:
            return self.labels
        return torch.where(self.shares >= 0.5, self.labels, self.partners)
