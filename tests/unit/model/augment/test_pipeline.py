"""What is done to a batch as a whole: for which purposes it draws, in which order, and without waiting for a device."""

import pytest
import torch

from dist_mnist.config.settings import Config
from dist_mnist.model.augment.affine import RandomAffine
from dist_mnist.model.augment.pipeline import Augmentation
from dist_mnist.model.losses import Targets
from dist_mnist.model.stateless_rng import fold_in, key_of

STILL = {"rotate": 0.0, "scale": 0.0, "shift": 0.0}
IDS = torch.arange(20)
IMAGES = torch.randint(0, 256, (20, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SAMPLES = IMAGES, IDS % 3
PARTNERS = IMAGES.flip(0), IDS % 5


def augmented(
    samples=SAMPLES, partners=PARTNERS, crop: int = 0, device: str = "cpu", **settings
) -> tuple[torch.Tensor, Targets]:
    augment = Augmentation(Config(**settings))
    keys = {purpose: fold_in(key_of(purpose, 0, 0), IDS).to(device) for purpose in augment.purposes}
    samples, partners = (tuple(tensor.to(device) for tensor in pair) for pair in (samples, partners))
    return augment(samples, partners, keys, crop)


@pytest.mark.parametrize(
    ("settings", "purposes"),
    [
        (STILL, []),
        ({}, ["augment"]),
        (STILL | {"adversarial": 0.1}, ["augment"]),
        (STILL | {"erasing": 0.1}, ["erase"]),
        (STILL | {"mixup": 0.1}, ["mix"]),
        ({"erasing": 0.1, "cutmix": 0.1}, ["augment", "erase", "mix"]),
    ],
    ids=str,
)
def test_pipeline_draws_for_what_is_turned_on_alone(settings, purposes):
    assert Augmentation(Config(**settings)).purposes == purposes


def test_pipeline_without_settings_leaves_images_and_labels():
    images, targets = augmented(**STILL)
    assert images is IMAGES and targets == Targets(SAMPLES[1])


def test_pipeline_crops_after_the_affine_transform_and_before_erasing_and_mixing():
    images, targets = augmented(crop=2, erasing=1.0, cutmix=1.0)
    assert images.shape == (20, 1, 8, 8)
    assert targets.shares is not None
    pixels = targets.shares * 64  # the box is one of cropped images, of which the share is what is left
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-4, rtol=0)
    moved = RandomAffine.of(Config())(IMAGES, fold_in(key_of("augment", 0, 0), IDS))
    assert augmented(crop=2)[0].equal(moved[:, :, 2:-2, 2:-2])


def test_pipeline_changes_a_partner_by_numbers_of_its_own():
    """Else an image that is mixed with itself would stay one."""
    alone, _ = augmented()
    mixed, targets = augmented(partners=SAMPLES, mixup=1000.0)
    assert ((alone - mixed).abs().amax((1, 2, 3)) > 10).all()
    assert targets.partners is not None and targets.partners.equal(SAMPLES[1])


def test_pipeline_reads_nothing_back_from_the_device():
    """Which a CUDA graph could not capture; a meta tensor has no values to read."""
    images, targets = augmented(device="meta", flip=True, shear=5.0, erasing=0.5, mixup=0.2, cutmix=1.0, mixup_prob=0.5)
    losses = targets.losses(torch.zeros(20, 5, device="meta"), 0.1)
    assert images.is_meta and losses.is_meta and targets.dominant().is_meta and images.shape == IMAGES.shape
