"""Exact evaluation: every sample counted once, integers summed over ranks, in fp32 on any device.

On CPUs each thread takes whole batches, by operations that have one thread: with several in one operation the last bits
would depend on their number.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from dist_mnist.data.coverage import Ledger
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Batch, Loader, ResidentImages
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.model.cnn import Network
from dist_mnist.model.losses import average, per_sample_loss

BATCH_SIZE = {"cpu": 500, "cuda": 1000}  # per rank


class Abandoned(Exception):
    """An evaluation was left unfinished, by all ranks after the same batch."""


@dataclass(frozen=True)
class Evaluation:
    """What a network made of a split: counts by true and predicted class, and the summed loss."""

    confusion: torch.Tensor  # (classes, classes) int64, rows true, columns predicted
    loss_sum: float

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
        """Share of images whose class was predicted."""
        return self.correct / self.images

    @property
    def loss(self) -> float:
        """Mean cross entropy, in nats."""
        return self.loss_sum / self.images

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values; accuracies of classes without images are null."""
        totals, hits = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return {
            "images": self.images,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "per_class_accuracy": [hit / total if total else None for hit, total in zip(hits, totals, strict=True)],
            "confusion_matrix": self.confusion.tolist(),
        }


def evaluate(
    networks: Network | Sequence[Network],
    dataset: IdxDataset,
    num_classes: int,
    world: World,
    resident: ResidentImages | None = None,
    move: Callable[[], object] = int,
    stop: Callable[[int], bool] = lambda _: False,
) -> Evaluation:
    """Evaluate a network on every sample of `dataset`, each rank on its part. Collective if the world is.

    Several networks are averaged in their probabilities. After every batch `move` is called, and `stop` asked, with the
    number of batches so far, whether to leave it at that; its answer has to be the same on all ranks.

    Raises:
        Abandoned: `stop` said so.
        LedgerError: a sample was not counted exactly once.
    """
    order = GlobalOrder(
        num_samples=len(dataset), global_batch_size=BATCH_SIZE[world.device.type] * world.size, shuffle=False
    )
    batches = Loader(dataset, order, range(order.steps_per_epoch), world, resident=resident)
    networks = [networks] if callable(networks) else networks
    ledger = Ledger(order, world)
    totals = sum_over_ranks(_count(networks, batches, num_classes, ledger, move, stop), world).cpu()
    ledger.close(0, "this evaluation")
    return Evaluation(totals[:-1].long().reshape(num_classes, num_classes), float(totals[-1]))


def predict(
    networks: Sequence[Network], dataset: IdxDataset, world: World, move: Callable[[], object] = int
) -> torch.Tensor:
    """The probabilities of each sample's classes, in the order of `dataset`: (N, classes) float64 on the CPU.

    Several networks are averaged in their probabilities. `move` is called with every batch. On one process by itself.
    """
    order = GlobalOrder(num_samples=len(dataset), global_batch_size=BATCH_SIZE[world.device.type], shuffle=False)
    batches = Loader(dataset, order, range(order.steps_per_epoch), world.alone())
    work = partial(_predict_batch, networks)
    found = []
    for _, of_batch in _with_results(work, batches, world.device):
        move()
        found.append(of_batch.cpu())
    return torch.cat(found)


def _count(
    networks: Sequence[Network],
    batches: Iterable[Batch],
    num_classes: int,
    ledger: Ledger,
    move: Callable[[], object],
    stop: Callable[[int], bool],
) -> torch.Tensor:
    """(classes * classes + 1,) float64: the confusion counts, exact up to 2^53, and the loss sum."""
    device = ledger.world.device
    totals = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64, device=device)
    with closing(_with_results(partial(_count_batch, networks, num_classes), batches, device)) as results:
        for done, (batch, of_batch) in enumerate(results, 1):
            move()
            ledger.add(batch.ids)
            totals += of_batch
            if stop(done):
                raise Abandoned  # and no thread goes on with a network that is trained again
    return totals


def _with_results(
    work: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], device: torch.device
) -> Generator[tuple[Batch, torch.Tensor], None, None]:
    """Each batch with what `work` makes of it; some at once."""
    waiting = iter(batches)
    with _workers(device) as (count, in_order):
        while group := list(islice(waiting, count)):
            yield from zip(group, in_order(work, group), strict=True)


@contextmanager
def _workers(device: torch.device) -> Iterator[tuple[int, Callable[..., Iterable[torch.Tensor]]]]:
    """How many batches to compute at once, and a `map` that does so."""
    if device.type != "cpu":
        yield 1, map
        return
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "evaluate", torch.set_num_threads, (1,)) as pool:
            yield count, pool.map
    finally:
        torch.set_num_threads(count)


@torch.inference_mode()
def _count_batch(networks: Sequence[Network], num_classes: int, batch: Batch) -> torch.Tensor:
    """The same of one batch."""
    logits = average([network(batch.images) for network in networks])
    cells = batch.labels * num_classes + logits.argmax(1)
    counts = torch.bincount(cells, minlength=num_classes * num_classes)
    return torch.cat([counts.double(), per_sample_loss(logits, batch.labels).double().sum(0, keepdim=True)])


@torch.inference_mode()
def _predict_batch(networks: Sequence[Network], batch: Batch) -> torch.Tensor:
    """(B, classes) float64."""
    return average([network(batch.images) for network in networks]).double().softmax(1)
