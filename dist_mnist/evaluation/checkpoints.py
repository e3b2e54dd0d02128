"""Evaluating networks that checkpoints hold: loading, checking that they fit the data, the result as a record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_mnist.config.resolve import from_json
from dist_mnist.config.settings import Config
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.splits import Data, open_data
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.evaluate import evaluate, predict
from dist_mnist.model.cnn import CNN, build_model, to_device
from dist_mnist.run.checkpoint import Arrays, CheckpointError, difference, evaluated_weights
from dist_mnist.run.checkpoint_store import Loaded, load_best
from dist_mnist.utils.errors import UserError


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
        **evaluate(networks, dataset, num_classes, world, on_batch=move).to_json(),
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
    loaded = [load_best(path) for path in paths]
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
    return Trained(path, to_device(model, world.device).eval(), info)


class Tested(NamedTuple):
    """A run's best model on the test set."""

    result: dict[str, Any]
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
    [best] = load_alike([run_dir], world)
    result = judge([best], "test", dataset, world, on_batch)
    of_images = predict([best.network], dataset, world, on_batch).numpy() if probabilities else None
    return Tested(result, best.network, dataset, of_images)
