"""What a run's settings do to images and labels between the loader and the network."""

from collections.abc import Mapping

import torch

from dist_mnist.config.settings import Config
from dist_mnist.model.augment.affine import RandomAffine
from dist_mnist.model.augment.erasing import RandomErasing
from dist_mnist.model.augment.mixing import Mixing
from dist_mnist.model.losses import Targets
from dist_mnist.model.stateless_rng import fold_in, key_of

Keys = Mapping[str, torch.Tensor]  # of each purpose, (B,) int64
Samples = tuple[torch.Tensor, torch.Tensor]  # images (B, C, H, W), labels (B,) int64


class Augmentation:
    """Affine transforms, a centre crop, random erasing, and mixing with partners, in this order; all by keys.

    `purposes` are those for which it needs random numbers, and so keys.
    """

    def __init__(self, config: Config):
        self.affine, self.erasing = RandomAffine.of(config), RandomErasing(config.erasing)
        self.mixing = Mixing.of(config)
        augments = self.affine != RandomAffine() or config.adversarial > 0  # which draws by the same key
        draws = {"augment": augments, "erase": config.erasing > 0, "mix": config.mixes}
        self.purposes = [purpose for purpose, needed in draws.items() if needed]

    def __call__(
        self, samples: Samples, partners: Samples | None, keys: Keys, crop: int
    ) -> tuple[torch.Tensor, Targets]:
        """Images as the network is to see them, and what they show.

        Args:
            partners: which the samples are mixed with, by mixup or cutmix; not used without.
            crop: pixels that the centre crop leaves out on each side.
        """
        images, labels = samples
        images = self._changed(images, keys, crop)
        if "mix" not in keys:
            return images, Targets(labels)
        assert partners is not None, "the loader's order is without partners"
        others = self._changed(partners[0], {name: fold_in(key_of("partner"), own) for name, own in keys.items()}, crop)
        images, shares = self.mixing(images, others, keys["mix"])
        return images, Targets(labels, partners[1], shares)

    def _changed(self, images: torch.Tensor, keys: Keys, crop: int) -> torch.Tensor:
        """One image of each, by itself."""
        if "augment" in keys:
            images = self.affine(images, keys["augment"])
        if crop:
            images = images[:, :, crop:-crop, crop:-crop]
        return self.erasing(images, keys["erase"]) if "erase" in keys else images
