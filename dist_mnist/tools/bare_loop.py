"""The limits of training and evaluation: plain PyTorch on one batch that is already on the device."""

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

Step = Callable[[int], None]  # takes the step number


def bare_training(model: Classifier, config: Config, batch: Batch) -> Step:
    """Return a step of forward, loss, backward and optimizer, on centre crops if configured; on a GPU a CUDA graph."""
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
    """Return a step that computes the logits of one batch."""

    @torch.inference_mode()
    def step(_: int) -> None:
        model(images)

    return step


def as_graph(step: Step) -> Step:
    """Capture a step as one CUDA graph, so that the limit excludes kernel launches."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # torch requires warm-up on a side stream before a capture
        for number in range(WARM_UP):
            step(number)
    torch.cuda.current_stream().wait_stream(aside)
    replay = capture(lambda: step(0))
    return lambda _: replay()
