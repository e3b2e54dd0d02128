"""The augmentation of images and labels between the loader and the network."""

from collections.abc import Mapping

import torch

from dist_mnist.config.settings import Config
from dist_mnist.model.augment.affine import RandomAffine
from dist_mnist.model.augment.erasing import RandomErasing
from dist_mnist.model.augment.mixing import Mixing
from dist_mnist.model.losses import Targets
from dist_mnist.model.stateless_rng import fold_in, key_of

Keys = Mapping[str, torch.Tensor]  # purpose to keys, (B,) int64
Samples = tuple[torch.Tensor, torch.Tensor]  # images (B, C, H, W), labels (B,) int64


class Augmentation:
    """Affine transforms, centre crop, random erasing and mixing with partners, in this order; keyed by sample.

    `purposes` lists the kinds of random numbers, for each of which a call needs keys.
    """

    def __init__(self, config: Config):
        self.affine, self.erasing = RandomAffine.of(config), RandomErasing(config.erasing)
        self.mixing = Mixing.of(config)
        augments = self.affine != RandomAffine() or config.adversarial > 0  # adversarial training uses the same key
        draws = {"augment": augments, "erase": config.erasing > 0, "mix": config.mixes}
        self.purposes = [purpose for purpose, needed in draws.items() if needed]

    def __call__(
        self, samples: Samples, partners: Samples | None, keys: Keys, crop: int
    ) -> tuple[torch.Tensor, Targets]:
        """Return the augmented images and their targets.

        Args:
            partners: samples to mix with, by mixup or CutMix; not used if both are off.
            crop: pixels that the centre crop removes on each side.
        """
        images, labels = samples
        images = self._changed(images, keys, crop)
        if "mix" not in keys:
            return images, Targets(labels)
        assert partners is not None, "the loader's order has no partners"
        others = self._changed(partners[0], {name: fold_in(key_of("partner"), own) for name, own in keys.items()}, crop)
        images, shares = self.mixing(images, others, keys["mix"])
        return images, Targets(labels, partners[1], shares)

    def _changed(self, images: torch.Tensor, keys: Keys, crop: int) -> torch.Tensor:
        """Augment each image, without mixing."""
        if "augment" in keys:
            images = self.affine(images, keys["augment"])
        if crop:
            images = images[:, :, crop:-crop, crop:-crop]
        return self.erasing(images, keys["erase"]) if "erase" in keys else images
