"""The limits of training and evaluation: a network's own work in plain PyTorch, on one batch that is on the device."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.distributed.device import autocast
from dist_mnist.model.classifier import Classifier
from dist_mnist.training.cuda_graph import WARM_UP, capture
from dist_mnist.training.optim import make_optimizer
from dist_mnist.training.torch_startup import take_step

Step = Callable[[int], None]  # is told its number


def bare_training(model: Classifier, config: Config, batch: Batch) -> Step:
    """Forward, loss, backward and optimizer, on centre crops where the run trains on such; on a GPU as a CUDA graph."""
    device = batch.images.device
    optimizer = make_optimizer(model, config, torch.tensor(1e-3, device=device))
    cast, crop = autocast(config.precision, device), config.crop
    images = batch.images[:, :, crop:-crop, crop:-crop] if crop else batch.images

    def step(_: int) -> None:
        optimizer.zero_grad()
        with cast():
            logits = model(images)
        F.cross_entropy(logits.float(), batch.labels).backward()
        take_step(optimizer)

    return as_graph(step) if device.type == "cuda" else step


def bare_inference(model: Classifier, images: torch.Tensor) -> Step:
    """The logits of one batch."""

    @torch.inference_mode()
    def step(_: int) -> None:
        model(images)

    return step


def as_graph(step: Step) -> Step:
    """A step as one CUDA graph: launching its kernels is no part of the limit."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch asks for before a capture
        for number in range(WARM_UP):
            step(number)
    torch.cuda.current_stream().wait_stream(aside)
    replay = capture(lambda: step(0))
    return lambda _: replay()
