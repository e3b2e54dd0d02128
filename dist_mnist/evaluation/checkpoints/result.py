"""Evaluation of models on a split: the result record."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import asdict

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.checkpoints.load import TrainedModel, load_models, with_weights
from dist_mnist.evaluation.checkpoints.split import EvaluatedSplit, open_split, to_calibrate
from dist_mnist.evaluation.choices import Split
from dist_mnist.evaluation.evaluate import Evaluation, evaluate, no_news, predict
from dist_mnist.evaluation.metrics import (
    MOST_SCORES,
    Figures,
    balanced_accuracy,
    best_temperature,
    figures_of,
    macro_f1,
)
from dist_mnist.model.classifier import Classifier
from dist_mnist.run.checkpoints.store import load_best
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import Ended, EvaluationResult, RunResult, RunSeconds


def evaluate_checkpoints(
    paths: Sequence[Path],
    split: Split,
    data_dir: Path | None,
    world: World,
    views: int | None = None,
    code: Sequence[str] = (),
    test_fraction: float | None = None,
) -> EvaluationResult:
    """Evaluate a checkpoint, or the averaged probabilities of several, on a split.

    Args:
        paths, views, code: as for `load_models`.
        split, data_dir, test_fraction: as for `open_split`.

    Raises:
        UserError: a checkpoint or the data cannot be read, or they do not match.
    """
    models = load_models(paths, world, views, code)
    return evaluate_models(models, split, open_split(models, split, data_dir, test_fraction), world)[0]


def evaluate_models(
    models: Sequence[TrainedModel],
    split: Split,
    evaluated: EvaluatedSplit,
    world: World,
    on_batch: Callable[[], object] = no_news,
) -> tuple[EvaluationResult, torch.Tensor | None]:
    """Evaluate the averaged probabilities of models on a split; `on_batch` is called after each batch.

    Returns:
        The result, and the logits (N, classes) on the CPU; None if they are too large to keep.
    """
    dataset, num_classes = evaluated.dataset, models[0].info.data.num_classes
    networks = [model.network for model in models]
    views = [network.views for network in networks]

    def evaluated_on(images: IdxDataset) -> Evaluation:
        keep_logits = len(images) * num_classes <= MOST_SCORES
        return evaluate(networks, images, num_classes, world, on_batch=on_batch, keep_logits=keep_logits)

    found, figures = evaluated_on(dataset), Figures()
    if found.logits is not None:
        temperature, validation = None, evaluated.validation
        if validation and (logits := evaluated_on(validation).logits) is not None:
            temperature = best_temperature(logits.numpy(), validation.sample_labels)
        figures = figures_of(found.logits.numpy(), dataset.sample_labels, temperature)
    confusion = found.confusion.numpy()
    result = EvaluationResult(
        split=split,
        checkpoints=tuple(model.path.name for model in models),
        checkpoint_sha256=tuple(model.sha256 for model in models),
        step=models[0].info.step if len(models) == 1 else tuple(model.info.step for model in models),
        views=views[0] if len(set(views)) == 1 else tuple(views),
        parameters=sum(network.num_parameters() for network in networks),
        images=found.images,
        correct=found.correct,
        accuracy=found.accuracy,
        loss=found.loss,
        balanced_accuracy=balanced_accuracy(confusion),
        macro_f1=macro_f1(confusion),
        **asdict(figures),
        per_class_accuracy=tuple(found.per_class_accuracy),
        confusion_matrix=tuple(map(tuple, found.confusion.tolist())),
        class_names=evaluated.class_names,
        held_out=(evaluated.test_fraction or None) if split == Split.TEST else None,
    )
    return result, found.logits


def predict_test(
    path: Path, data_dir: Path | None, world: World, code: Sequence[str] = (), test_fraction: float | None = None
) -> tuple[torch.Tensor, IdxDataset]:
    """Return a checkpoint's test probabilities (N, classes) float64 and images; raises as `evaluate_checkpoints`."""
    models = load_models([path], world, code=code)
    test = open_split(models, Split.TEST, data_dir, test_fraction).dataset
    return predict([model.network for model in models], test, world), test


class Tested(NamedTuple):
    """A run's best model, and its result on the test set."""

    result: RunResult
    model: Classifier
    dataset: IdxDataset
    probabilities: np.ndarray | None  # (N, classes) float64, if a listener shows them


def evaluate_best(
    plan: Plan,
    model: Classifier,
    world: World,
    on_batch: Callable[[], object],
    seconds: Callable[[], RunSeconds | None],
    ended: str,
) -> Tested:
    """Evaluate the best checkpoint of a run on the test set, in the run's own `model`. Not collective.

    `ended` is an `Ended`. `seconds` is called after the evaluation. Probabilities are returned for TensorBoard and
    `--log-to`, which show them.

    Raises:
        UserError: the run has no checkpoint.
    """
    best, data = with_weights(load_best(plan.run.path), plan.config, model, world), plan.data
    evaluated = EvaluatedSplit(data.test, data.class_names, data.test_fraction, to_calibrate(data.validation))
    evaluation, logits = evaluate_models([best], Split.TEST, evaluated, world, on_batch)
    result = RunResult(**asdict(evaluation), seconds=seconds(), ended=Ended(ended))
    of_images = None
    if plan.config.tensorboard or plan.config.log_to:
        found = predict([best.network], data.test, world, on_batch) if logits is None else logits.double().softmax(1)
        of_images = found.numpy()
    return Tested(result, best.network, data.test, of_images)
