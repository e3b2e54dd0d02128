"""Exact evaluation: every sample counts once, integer counts are summed over ranks, in fp32 on any device.

On CPUs each thread evaluates whole batches with single-threaded operations: if several threads shared an operation, the
last bits would depend on their number.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch

from dist_mnist.data.coverage import Coverage
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Batch, Loader, ResidentImages
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.model.classifier import Predictor, Wrapped, copy_network
from dist_mnist.model.losses import average_predictions, per_sample_loss
from dist_mnist.run.records import ValidationScore

T = TypeVar("T")
BATCH_SIZE = {"cpu": 500, "cuda": 1000}  # per rank


@dataclass(frozen=True)
class Evaluation:
    """A model's result on a split: counts by true and predicted class, and the summed loss."""

    confusion: torch.Tensor  # (classes, classes) int64, rows true, columns predicted
    loss_sum: float
    logits: torch.Tensor | None = None  # (N, classes) float on the CPU in the order of the samples, if kept

    @property
    def images(self) -> int:
        """Images evaluated."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Images whose class was predicted."""
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """Fraction of images whose class was predicted."""
        return self.correct / self.images

    @property
    def score(self) -> ValidationScore:
        """The score that a checkpoint carries."""
        return ValidationScore(accuracy=self.accuracy, loss=self.loss)

    @property
    def loss(self) -> float:
        """Mean cross entropy, in nats."""
        return self.loss_sum / self.images

    @property
    def per_class_accuracy(self) -> list[float | None]:
        """Fraction of each class's images whose class was predicted; None for a class without images."""
        totals, hits = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]


def no_news() -> None:
    """Do nothing after a batch."""


def never() -> bool:
    """Return False: an evaluation is not to be stopped."""
    return False


def evaluate(
    models: Predictor | Sequence[Predictor],
    dataset: IdxDataset,
    num_classes: int,
    world: World,
    resident: ResidentImages | None = None,
    on_batch: Callable[[], object] = no_news,
    keep_logits: bool = False,
) -> Evaluation:
    """Evaluate a model on every sample of `dataset`, each rank on its part. Collective over `world`.

    The probabilities of several models are averaged. `on_batch` is called after every batch. With `keep_logits` every
    rank gets the logits of all samples.

    Raises:
        CoverageError: a sample was not counted exactly once.
    """
    evaluation = evaluate_unless_stopped(models, dataset, num_classes, world, resident, on_batch, never, keep_logits)
    assert evaluation
    return evaluation


def evaluate_unless_stopped(
    models: Predictor | Sequence[Predictor],
    dataset: IdxDataset,
    num_classes: int,
    world: World,
    resident: ResidentImages | None,
    on_batch: Callable[[], object],
    should_stop: Callable[[], bool],
    keep_logits: bool = False,
) -> Evaluation | None:
    """Evaluate like `evaluate`, unless `should_stop`, which is called after every batch, returns True.

    `should_stop` must return the same on all ranks.

    Returns:
        The evaluation, the same on all ranks; None if it was stopped.

    Raises:
        CoverageError: a sample was not counted exactly once.
    """
    order = GlobalOrder(
        num_samples=len(dataset), global_batch_size=BATCH_SIZE[world.device.type] * world.size, shuffle=False
    )
    batches = Loader(dataset, order, range(order.steps_per_epoch), world, resident=resident)
    work = partial(_count_batch, _Copies([models] if callable(models) else models), num_classes)
    coverage = Coverage(order, world)
    # (classes * classes + 1,): the confusion counts, exact up to 2^53, and the loss sum.
    totals = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64, device=world.device)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Closed on every exit, so that no thread still uses a model that is being trained again.
    with closing(_with_results(work, batches, world.device)) as results:
        for batch, of_batch in results:
            on_batch()
            coverage.add(batch.ids)
            totals += of_batch.counts
            if keep_logits:
                kept.append((batch.ids, of_batch.logits))
            if should_stop():
                return None
    totals = sum_over_ranks(totals, world).cpu()
    coverage.close(0, "this evaluation")
    logits = _gather_logits(kept, len(dataset), world) if keep_logits else None
    return Evaluation(totals[:-1].long().reshape(num_classes, num_classes), float(totals[-1]), logits)


def _gather_logits(kept: list[tuple[torch.Tensor, torch.Tensor]], count: int, world: World) -> torch.Tensor:
    """Gather each rank's logits (B, classes) by their ids (B,) into (count, classes) on the CPU. Collective."""
    ids, logits = (torch.cat(each) for each in zip(*kept, strict=True))
    ordered = logits.new_zeros(count, logits.shape[1])
    ordered[ids] = logits
    return sum_over_ranks(ordered, world).cpu()


def predict(
    models: Sequence[Predictor], dataset: IdxDataset, world: World, on_batch: Callable[[], object] = no_news
) -> torch.Tensor:
    """Return the class probabilities of all samples, in the order of `dataset`: (N, classes) float64 on the CPU.

    The probabilities of several models are averaged. `on_batch` is called after every batch. Not collective.
    """
    order = GlobalOrder(num_samples=len(dataset), global_batch_size=BATCH_SIZE[world.device.type], shuffle=False)
    batches = Loader(dataset, order, range(order.steps_per_epoch), world.alone())
    found = []
    for _, of_batch in _with_results(partial(_predict_batch, _Copies(models)), batches, world.device):
        on_batch()
        found.append(of_batch.cpu())
    return torch.cat(found)


def _with_results(
    work: Callable[[Batch], T], batches: Iterable[Batch], device: torch.device
) -> Generator[tuple[Batch, T], None, None]:
    """Yield each batch with its result of `work`; several batches are computed at once."""
    waiting = iter(batches)
    with _workers(device) as (count, in_order):
        while group := list(islice(waiting, count)):
            yield from zip(group, in_order(work, group), strict=True)


@contextmanager
def _workers(device: torch.device) -> Iterator[tuple[int, Callable[..., Iterable[Any]]]]:
    """Yield how many batches to compute at once, and a `map` that does so."""
    if device.type != "cpu":
        yield 1, map
        return
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "evaluate", torch.set_num_threads, (1,)) as pool:
            yield count, pool.map
    finally:
        torch.set_num_threads(count)


class _Copies:
    """Models, and a copy for each thread of those that may keep state of a batch during the forward pass."""

    def __init__(self, models: Sequence[Predictor]):
        self.models, self.local = models, threading.local()

    def of_this_thread(self) -> Sequence[Predictor]:
        """Return the models that the current thread may use."""
        if threading.current_thread() is threading.main_thread():
            return self.models
        if not hasattr(self.local, "models"):
            self.local.models = [copy_network(one) if isinstance(one, Wrapped) else one for one in self.models]
        return self.local.models


class _Counted(NamedTuple):
    """A batch's confusion counts and loss sum, (classes * classes + 1,) float64, and its logits (B, classes)."""

    counts: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()  # not inference_mode: training may use tensors that a module keeps
def _count_batch(models: _Copies, num_classes: int, batch: Batch) -> _Counted:
    logits = average_predictions([model(batch.images) for model in models.of_this_thread()])
    cells = batch.labels * num_classes + logits.argmax(1)  # of the confusion matrix, row by row
    counts = torch.bincount(cells, minlength=num_classes * num_classes)
    loss = per_sample_loss(logits, batch.labels).double().sum(0, keepdim=True)
    return _Counted(torch.cat([counts.double(), loss]), logits)


@torch.no_grad()  # not inference_mode: training may use tensors that a module keeps
def _predict_batch(models: _Copies, batch: Batch) -> torch.Tensor:
    """Return probabilities (B, classes) float64."""
    return probabilities(models.of_this_thread(), batch.images)


def probabilities(models: Sequence[Predictor], images: torch.Tensor) -> torch.Tensor:
    """Return the models' average probabilities, (B, classes) float64, for images (B, C, H, W) on their device."""
    return average_predictions([model(images) for model in models]).double().softmax(1)
