"""Evaluation of checkpoints: from their paths to models in eval mode, from these and a split to a record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dist_mnist.config.settings import Config
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.splits import open_data
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.choices import Split
from dist_mnist.evaluation.evaluate import evaluate, no_news, predict
from dist_mnist.model.cnn import CNN, build_model, to_device
from dist_mnist.run.checkpoint import Checkpoint, CheckpointError, difference, evaluated_weights
from dist_mnist.run.checkpoint_store import load_best
from dist_mnist.run.records import CheckpointInfo, DataFacts, EvaluationResult
from dist_mnist.utils.errors import UserError


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model in eval mode on its device, with the weights that are evaluated (the EMA, if there is one).

    `config` has the number of views by which it is evaluated, whatever its run was told.
    """

    path: Path
    info: CheckpointInfo
    config: Config
    network: CNN


def evaluate_checkpoints(
    paths: Sequence[Path], split: Split, data_dir: Path | None, world: World, views: int | None = None
) -> EvaluationResult:
    """Evaluate a checkpoint, or several averaged in their probabilities, on a split.

    Args:
        paths: as in `load_models`, as is `views`.
        split: as in `open_split`, as is `data_dir`.

    Raises:
        UserError: a checkpoint or the data cannot be read, or they do not go together.
    """
    models = load_models(paths, world, views)
    return evaluate_models(models, split, open_split(models, split, data_dir), world)


def evaluate_models(
    models: Sequence[TrainedModel],
    split: Split,
    dataset: IdxDataset,
    world: World,
    on_batch: Callable[[], object] = no_news,
) -> EvaluationResult:
    """Evaluate models, averaged in their probabilities, on a split; `on_batch` is called after each batch."""
    networks = [model.network for model in models]
    views = [network.views for network in networks]
    found = evaluate(networks, dataset, models[0].info.data.num_classes, world, on_batch=on_batch)
    return EvaluationResult(
        split=split,
        checkpoints=tuple(model.path.name for model in models),
        step=models[0].info.step if len(models) == 1 else tuple(model.info.step for model in models),
        views=views[0] if len(set(views)) == 1 else tuple(views),
        parameters=sum(network.num_parameters() for network in networks),
        images=found.images,
        correct=found.correct,
        accuracy=found.accuracy,
        loss=found.loss,
        per_class_accuracy=tuple(found.per_class_accuracy),
        confusion_matrix=tuple(map(tuple, found.confusion.tolist())),
    )


def predict_test(path: Path, data_dir: Path | None, world: World) -> tuple[torch.Tensor, IdxDataset]:
    """A checkpoint's probabilities for the test images, (N, classes) float64, and these; errors as above."""
    models = load_models([path], world)
    test = open_split(models, Split.TEST, data_dir)
    return predict([model.network for model in models], test, world), test


def load_models(paths: Sequence[Path], world: World, views: int | None = None) -> list[TrainedModel]:
    """The models of checkpoints that are used together.

    Args:
        paths: checkpoint files, or run directories for the best checkpoint in each.
        views: of each image, whose predictions are averaged (TTA); None for as many as each run was told.

    Raises:
        UserError: a checkpoint cannot be read, or they are of different images or classes.
    """
    checkpoints = [load_best(path) for path in paths]
    first, *others = checkpoints
    for other in others:
        if (one := _described(first.info.data)) != (another := _described(other.info.data)):
            raise UserError(
                f"{first.path} was trained on {one}, and {other.path} on {another}: they cannot be used together"
            )
    return [_build(checkpoint, views, world) for checkpoint in checkpoints]


def open_split(models: Sequence[TrainedModel], split: Split, data_dir: Path | None) -> IdxDataset:
    """The images to evaluate models on.

    Args:
        data_dir: folder of idx files; None for the one that the first model was trained on.

    Raises:
        UserError: the data cannot be read, or does not go together with a model.
    """
    config = models[0].config
    folder = data_dir or Path(models[0].info.data.folder)
    data = open_data(folder, config.validation_fraction, config.split_seed)
    dataset: IdxDataset = getattr(data, split)
    for model in models:
        facts = model.info.data
        if data.test.image_shape != facts.image_shape or data.num_classes > facts.num_classes:
            raise UserError(
                f"{model.path} was trained on {_described(facts)}, but {folder} holds {list(data.test.image_shape)} in "
                f"{data.num_classes}; give another --data-dir"
            )
        same_split = all(
            getattr(model.config, name) == getattr(config, name) for name in ("split_seed", "validation_fraction")
        )
        if split != Split.TEST and not (data.fingerprint == facts.fingerprint and same_split):
            raise UserError(
                f"{model.path}: the {split} split is a part of the files that a checkpoint was trained on; those in "
                f"{folder}, or the settings by which they are split, are others; evaluate --split test"
            )
        if len(dataset) == 0:
            raise UserError(f"{model.path} was trained without a {split} split (--validation-fraction 0)")
    return dataset


def _described(data: DataFacts) -> str:
    return f"images of {list(data.image_shape)} (channels, height, width) in {data.num_classes} classes"


def _build(checkpoint: Checkpoint, views: int | None, world: World) -> TrainedModel:
    """The model of a checkpoint with the weights that are evaluated, after a check that they fit and are finite."""
    path, data = checkpoint.path, checkpoint.info.data
    config = checkpoint.info.config(path, **({} if views is None else {"views": views}))
    weights = {name: torch.from_numpy(array) for name, array in evaluated_weights(checkpoint.arrays).items()}
    try:
        with torch.device("meta"):  # without memory, of which settings could ask for any amount
            expected = build_model(config, data.image_shape, data.num_classes).state_dict()
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its weights are not those of its settings, of which no network can be made ({error})"
        ) from None
    if different := difference(weights, expected):
        raise CheckpointError(f"{path}: its weights are not those of its settings: {different}")
    if strange := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path}: its weights are not finite numbers ({strange[0]}); use an earlier checkpoint")
    network = build_model(config, data.image_shape, data.num_classes)
    network.load_state_dict(weights)
    return TrainedModel(path, checkpoint.info, config, to_device(network, world.device).eval())


class Tested(NamedTuple):
    """A run's best model on the test set."""

    result: EvaluationResult
    model: CNN
    dataset: IdxDataset
    probabilities: np.ndarray | None  # (N, classes) float64, if asked for


def evaluate_best(
    run_dir: Path, dataset: IdxDataset, world: World, on_batch: Callable[[], object], probabilities: bool
) -> Tested:
    """Evaluate the best checkpoint of a run; on one process by itself.

    Raises:
        UserError: there is none.
    """
    [best] = load_models([run_dir], world)
    result = evaluate_models([best], Split.TEST, dataset, world, on_batch)
    of_images = predict([best.network], dataset, world, on_batch).numpy() if probabilities else None
    return Tested(result, best.network, dataset, of_images)
