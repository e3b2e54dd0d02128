"""Adversarial training: images moved along the gradient of their loss (fast gradient method)."""

import torch

from dist_mnist.model.classifier import Classifier
from dist_mnist.model.losses import Targets


def fgm_perturb(model: Classifier, images: torch.Tensor, targets: Targets, amounts: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), each moved along the gradient of its loss, by an amount (B,) of its Euclidean norm; float32.

    The model is in eval mode meanwhile, without test-time augmentation; its parameters, buffers and running statistics
    stay as they are. After Goodfellow, Shlens and Szegedy: "Explaining and Harnessing Adversarial Examples", ICLR 2015,
    who go along the gradient's signs.
    """
    was_training = model.training
    images = images.detach().float().requires_grad_()
    losses = targets.losses(model.eval().forward_single(images))
    (gradient,) = torch.autograd.grad(losses.sum(), images)  # no time is spent on that of the weights
    model.train(was_training)  # only now: activation checkpointing computes forward again
    with torch.no_grad():
        norm, slope = (torch.linalg.vector_norm(of, dim=(1, 2, 3), keepdim=True) for of in (images, gradient))
        # Where the loss is as good as zero, so is the slope, whose squares are then too small for float32.
        return images + gradient * (amounts[:, None, None, None] * norm / slope.clamp(min=1e-12))
