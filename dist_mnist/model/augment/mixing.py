"""Mixup and CutMix: mixtures of two images and of their labels."""

import math
from dataclasses import dataclass

import torch

from dist_mnist.config.settings import Config
from dist_mnist.model.augment.boxes import Span, box_mask
from dist_mnist.model.stateless_rng import uniform


@dataclass(frozen=True)
class Mixing:
    """Mix each image with its partner: by a weighted mean of both (mixup), or by a box from the partner (CutMix).

    Zhang, Cisse, Dauphin and Lopez-Paz: "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun, Han, Oh, Chun,
    Choe and Yoo: "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
    The weight of the first image is drawn from Beta(alpha, alpha). If both are on, each image gets either with equal
    probability.

    Args:
        mixup, cutmix: alpha of each; 0 turns it off.
        probability: probability that an image is mixed.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    @classmethod
    def of(cls, config: Config) -> "Mixing":
        """Return the mixing that a run's settings describe."""
        return cls(config.mixup, config.cutmix, config.mixup_prob)

    def __call__(
        self, images: torch.Tensor, partners: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images and partners, (B, C, H, W) of any dtype, by random numbers from keys (B,) int64.

        Returns:
            Mixtures (B, C, H, W) float32, and the first image's weight in each, (B,) float32; 1 for an unmixed image.
        """
        coin, which, first, second, down, across = uniform(keys, 6).unbind(1)
        cut = which < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        shares = symmetric_beta(torch.where(cut, self.cutmix, self.mixup), first, second)
        shares = torch.where(coin < self.probability, shares, 1.0)
        boxes = _boxes(shares, down, across, images)
        of_partner = torch.where(cut[:, None, None, None], boxes, (1 - shares)[:, None, None, None])  # (B, 1, H, W)
        return images.float() * (1 - of_partner) + partners.float() * of_partner, 1 - of_partner.mean((1, 2, 3))


def symmetric_beta(alphas: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sample Beta(alpha, alpha) for alphas > 0 (B,) from two uniform numbers in [0, 1) each; (B,) float32 in [0, 1].

    If T has Student's t distribution with 2 alpha degrees of freedom, 1/2 + T / (2 sqrt(2 alpha + T^2)) has this one
    (Devroye, "Random variate generation in one line of code", WSC 1996); T by Bailey's polar method ("Polar Generation
    of Random Variates with the t-Distribution", Mathematics of Computation, 1994).
    """
    radius = (1 - first.double()) ** (-1 / alphas.double()) - 1  # up to infinity for small alphas
    cosine = torch.cos(2 * math.pi * second.double())
    return (0.5 + 0.5 * cosine.sign() * (1 + 1 / (radius * cosine**2)) ** -0.5).float()


def _boxes(shares: torch.Tensor, down: torch.Tensor, across: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return masks (B, 1, H, W) float32: 1 in a box of area 1 - share around a random centre, clipped to the image."""
    fractions, (height, width) = (1 - shares).sqrt(), images.shape[2:]
    return box_mask(_span(down, fractions, height), _span(across, fractions, width), images).float()


def _span(centres: torch.Tensor, fractions: torch.Tensor, side: int) -> Span:
    middle, half = (centres * side).long(), (fractions * side).long() // 2
    return middle - half, middle + half
