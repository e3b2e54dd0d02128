"""Adversarial training by the fast gradient method (FGM)."""

import torch

from dist_mnist.model.classifier import Classifier
from dist_mnist.model.losses import Targets


def fgm_perturb(model: Classifier, images: torch.Tensor, targets: Targets, amounts: torch.Tensor) -> torch.Tensor:
    """Perturb images (B, C, H, W) along the gradient of their loss, by fractions (B,) of their Euclidean norm; float32.

    The gradient is taken in eval mode, without test-time augmentation; parameters, buffers and running statistics do
    not change. After Goodfellow, Shlens and Szegedy: "Explaining and Harnessing Adversarial Examples", ICLR 2015, who
    follow the gradient's signs.
    """
    was_training = model.training
    images = images.detach().float().requires_grad_()
    losses = targets.losses(model.eval().forward_single(images))
    (gradient,) = torch.autograd.grad(losses.sum(), images)  # skips the gradient of the weights
    model.train(was_training)  # after the backward pass: activation checkpointing recomputes the forward pass
    with torch.no_grad():
        norm, slope = (torch.linalg.vector_norm(of, dim=(1, 2, 3), keepdim=True) for of in (images, gradient))
        # Where the loss is almost zero, so is the gradient, and its squares underflow float32.
        return images + gradient * (amounts[:, None, None, None] * norm / slope.clamp(min=1e-12))
