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
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_mnist.checkpoint import Arrays, CheckpointError, difference, evaluated_weights
from dist_mnist.config import Config, from_json
from dist_mnist.data.dataset import Data, IdxDataset, open_data
from dist_mnist.data.loader import Batch, Loader, ResidentImages
from dist_mnist.data.order import GlobalOrder
from dist_mnist.distributed import World, sum_over_ranks
from dist_mnist.errors import UserError, warn
from dist_mnist.ledger import Ledger
from dist_mnist.model import CNN, average, build_model, per_sample_loss, place
from dist_mnist.run_directory import Loaded, load_best

BATCH_SIZE = {"cpu": 500, "cuda": 1000}  # per rank

Network = Callable[[torch.Tensor], torch.Tensor]


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


def evaluate_checkpoints(
    paths: list[Path],
    split: str,
    data_dir: Path | None,
    world: World,
    move: Callable[[], object] = int,
    views: int | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or several averaged in their probabilities, on a split.

    Args:
        paths: checkpoint files, or run directories for the best checkpoint in each.
        split: "train", "validation" or "test".
        data_dir: folder of idx files; None for the one that the (first) checkpoint was trained on.
        move: called with every batch.
        views: of each image, that are averaged as well; None for as many as a checkpoint's run was told.

    Raises:
        UserError: a checkpoint or the data cannot be read, or they do not go together.
    """
    found, dataset = load_networks(paths, split, data_dir, world, views)
    return judge(found, split, dataset, world, move)


def judge(
    found: "list[Trained]", split: str, dataset: IdxDataset, world: World, move: Callable[[], object] = int
) -> dict[str, Any]:
    """The same for networks and a split that have been loaded."""
    networks, num_classes = [one.network for one in found], found[0].info["data"]["num_classes"]
    steps, views = [one.info["step"] for one in found], [network.views for network in networks]
    return {
        "split": split,
        "checkpoints": [one.path.name for one in found],
        "step": steps[0] if len(steps) == 1 else steps,
        "views": views[0] if len(set(views)) == 1 else views,
        "parameters": sum(network.num_parameters() for network in networks),
        **evaluate(networks, dataset, num_classes, world, move=move).to_json(),
    }


class Trained(NamedTuple):
    """A checkpoint's file, its network as it is evaluated, and what the checkpoint says of itself."""

    path: Path
    network: CNN
    info: dict[str, Any]


def load_networks(
    paths: list[Path], split: str, data_dir: Path | None, world: World, views: int | None = None
) -> tuple[list[Trained], IdxDataset]:
    """The networks of some checkpoints, and the split to evaluate them on; arguments and errors as above."""
    loaded = _load_together(paths, views)
    first, _, info = loaded[0]
    config = from_json(info["settings"], first)
    folder = data_dir or Path(info["data"]["folder"])
    data = open_data(folder, config.validation_fraction, config.split_seed)
    for path, _, info in loaded:
        _check_fit(path, info, config, data, folder, split)
    return [_rebuild(*one, world) for one in loaded], getattr(data, split)


def predict_test(path: Path, data_dir: Path | None, world: World) -> tuple[torch.Tensor, IdxDataset]:
    """What the network of a checkpoint makes of the test images, see `predict`, and these; errors as above."""
    [trained], test = load_networks([path], "test", data_dir, world)
    return predict([trained.network], test, world), test


def load_alike(paths: list[Path], world: World, views: int | None = None) -> list[Trained]:
    """The networks of some checkpoints that are used together, for whatever images; `views` as above.

    Raises:
        UserError: a checkpoint cannot be read, or they are of different images or classes.
    """
    return [_rebuild(*one, world) for one in _load_together(paths, views)]


def _load_together(paths: list[Path], views: int | None) -> list[Loaded]:
    """The best checkpoint of each path, told of so many views; an error if they are of different images or classes."""
    loaded = [load_best(path, warn) for path in paths]
    first, _, facts = loaded[0]
    for other, _, info in loaded:
        for what in ("image_shape", "num_classes"):
            if facts["data"][what] != info["data"][what]:
                raise UserError(
                    f"{first} has {what.replace('_', ' ')} {facts['data'][what]}, and {other} {info['data'][what]}: "
                    "they cannot be used together"
                )
        if views is not None:
            info["settings"]["views"] = views
    return loaded


def _check_fit(path: Path, info: dict[str, Any], config: Config, data: Data, folder: Path, split: str) -> None:
    facts, own = info["data"], from_json(info["settings"], path)
    shape = list(data.test.image_shape)
    if shape != facts["image_shape"] or data.num_classes > facts["num_classes"]:
        raise UserError(
            f"{path} was trained on images of {facts['image_shape']} (channels, height, width) in "
            f"{facts['num_classes']} classes, but {folder} holds {shape} in {data.num_classes}; give another --data-dir"
        )
    same_split = (own.split_seed, own.validation_fraction) == (config.split_seed, config.validation_fraction)
    if split != "test" and not (data.fingerprint == facts["fingerprint"] and same_split):
        raise UserError(
            f"{path}: the {split} split is a part of the files that a checkpoint was trained on; those in {folder}, or "
            "the settings by which they are split, are others; evaluate --split test"
        )
    if len(getattr(data, split)) == 0:
        raise UserError(f"{path} was trained without a {split} split (--validation-fraction 0)")


def _rebuild(path: Path, arrays: Arrays, info: dict[str, Any], world: World) -> Trained:
    """The network of a checkpoint with the weights that are evaluated."""
    described = from_json(info["settings"], path), tuple(info["data"]["image_shape"]), info["data"]["num_classes"]
    weights = {name: torch.from_numpy(array) for name, array in evaluated_weights(arrays).items()}
    try:
        with torch.device("meta"):  # without memory, of which settings could ask for any amount
            expected = build_model(*described).state_dict()
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its weights are not those of its settings, of which no network can be made ({error})"
        ) from None
    if different := difference(weights, expected):
        raise CheckpointError(f"{path}: its weights are not those of its settings: {different}")
    if strange := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path}: its weights are not finite numbers ({strange[0]}); use an earlier checkpoint")
    model = build_model(*described)
    model.load_state_dict(weights)
    return Trained(path, place(model, world.device).eval(), info)
