"""Evaluation of checkpoints: from their paths to models in eval mode, from these and a split to a record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import asdict

from dist_mnist.config.settings import Config, is_own_code, named_again
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.labels import listed
from dist_mnist.data.splits import Data, open_data, open_test50k
from dist_mnist.distributed.world import World
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
from dist_mnist.model.build import build_model
from dist_mnist.model.classifier import Classifier, to_device
from dist_mnist.model.source import ModelSource, NotInstalled
from dist_mnist.run.checkpoints.file import Checkpoint, CheckpointError, difference, evaluated_weights
from dist_mnist.run.checkpoints.store import load_best
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import CheckpointInfo, DataFacts, Ended, EvaluationResult, RunResult, RunSeconds
from dist_mnist.utils.errors import UserError, short, warn
from dist_mnist.utils.files import path_of

MOST_TO_CALIBRATE = 10_000


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model in eval mode on its device, with the weights that are evaluated (the EMA, if there is one).

    `config` has the number of views by which it is evaluated, whatever its run was told.
    """

    path: Path
    info: CheckpointInfo
    config: Config
    network: Classifier
    sha256: str  # of the checkpoint


def evaluate_checkpoints(
    paths: Sequence[Path],
    split: Split,
    data_dir: Path | None,
    world: World,
    views: int | None = None,
    code: Sequence[str] = (),
    test_fraction: float | None = None,
) -> EvaluationResult:
    """Evaluate a checkpoint, or several averaged in their probabilities, on a split.

    Args:
        paths: as in `load_models`, as are `views` and `code`.
        split: as in `open_split`, as are `data_dir` and `test_fraction`.

    Raises:
        UserError: a checkpoint or the data cannot be read, or they do not go together.
    """
    models = load_models(paths, world, views, code)
    return evaluate_models(models, split, open_split(models, split, data_dir, test_fraction), world)[0]


def evaluate_models(
    models: Sequence[TrainedModel],
    split: Split,
    evaluated: "EvaluatedSplit",
    world: World,
    on_batch: Callable[[], object] = no_news,
) -> tuple[EvaluationResult, torch.Tensor | None]:
    """Evaluate models, averaged in their probabilities, on a split; `on_batch` is called after each batch.

    Returns:
        The figures, and the logits (N, classes) on the CPU unless they are too many to hold.
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
    """A checkpoint's probabilities for the test images, (N, classes) float64, and these; errors as above."""
    models = load_models([path], world, code=code)
    test = open_split(models, Split.TEST, data_dir, test_fraction).dataset
    return predict([model.network for model in models], test, world), test


def load_models(
    paths: Sequence[Path], world: World, views: int | None = None, code: Sequence[str] = ()
) -> list[TrainedModel]:
    """The models of checkpoints that are used together.

    Args:
        paths: checkpoint files, or run directories for the best checkpoint in each.
        views: of each image, whose predictions are averaged (TTA); None for as many as each run was told.
        code: the user's own networks, as for `--model`: no code is taken from a checkpoint.

    Raises:
        UserError: a checkpoint cannot be read, they are of different images or classes, or their code is not given.
    """
    checkpoints = [load_best(path) for path in paths]
    first, *others = checkpoints
    for other in others:
        if (one := _described(first.info.data)) != (another := _described(other.info.data)):
            raise UserError(
                f"{first.path} was trained on {one}, and {other.path} on {another}: they cannot be used together"
            )
    return [_build(checkpoint, views, world, code) for checkpoint in checkpoints]


class EvaluatedSplit(NamedTuple):
    """Images to evaluate models on, what their classes are called, and how many of the training images they are.

    `validation` are other images that no model was trained on, for the best temperature; None where there are none.
    """

    dataset: IdxDataset
    class_names: tuple[str, ...]
    test_fraction: float  # 0 where there are test files
    validation: IdxDataset | None


def open_split(
    models: Sequence[TrainedModel], split: Split, data_dir: Path | None, test_fraction: float | None = None
) -> EvaluatedSplit:
    """The images to evaluate models on.

    Args:
        data_dir: folder of idx files; None for the one that the first model was trained on.
        test_fraction: of the training images, where there are no test files; None for that of the first model's run.

    Raises:
        UserError: the data cannot be read, or does not go together with a model.
    """
    first, config = models[0].info.data, models[0].config
    folder = data_dir or path_of(first.folder)
    data = open_data(
        folder, config.validation_fraction, config.split_seed, layout=config.layout, like=first.reading,
        validation_fold=config.fold,
        test_fraction=config.test_fraction if test_fraction is None else test_fraction,
    )  # fmt: skip
    for note in data.notes:
        warn(note)
    dataset: IdxDataset = open_test50k(folder, data) if split == Split.TEST50K else getattr(data, split)
    for model in models:
        facts = model.info.data
        if data.test.image_shape != facts.image_shape or data.num_classes > facts.num_classes:
            raise UserError(
                f"{model.path} was trained on {_described(facts)}, but {folder} holds {list(data.test.image_shape)} in "
                f"{data.num_classes}; give another --data-dir"
            )
        if facts.reading.label_numbers != data.label_numbers and facts.names != data.class_names:
            raise UserError(
                f"{model.path} was trained on the classes {listed(facts.names)}, but {folder} holds "
                f"{listed(data.class_names)}; give another --data-dir"
            )
        if split != Split.TEST50K:
            _check_split(model, split, data, folder, config)
        if len(dataset) == 0:
            raise UserError(f"{model.path} was trained without a {split} split (--validation-fraction 0)")
    classes = zip(data.label_numbers, data.class_names, first.names, strict=True)
    if first.class_names and any(here != there and here != str(label) for label, here, there in classes):
        warn(f"{folder} calls the classes {listed(data.class_names)}, {models[0].path} {listed(first.names)}")
    held_out = split in (Split.TEST, Split.TEST50K) and all(_same_validation(model, data, config) for model in models)
    validation = data.validation if held_out else None
    return EvaluatedSplit(dataset, first.class_names or data.class_names, data.test_fraction, _to_calibrate(validation))


def _to_calibrate(validation: IdxDataset | None) -> IdxDataset | None:
    """Validation images to fit one number on, of which there need not be more than some thousand."""
    return validation.first(MOST_TO_CALIBRATE) if validation else None


def _same_validation(model: TrainedModel, data: Data, config: Config) -> bool:
    """Whether the validation split of `data`, made by the settings `config`, is that of a model's run."""
    own = model.config
    settings = [(one.split_seed, one.validation_fraction, one.validation_fold) for one in (own, config)]
    same = own.test_fraction == data.test_fraction and data.fingerprint == model.info.data.fingerprint
    return same and settings[0] == settings[1]


def _check_split(model: TrainedModel, split: Split, data: Data, folder: Path, config: Config) -> None:
    """Check that a split which is a part of training files is not, in part, what a model was trained on."""
    same_files, own = data.fingerprint == model.info.data.fingerprint, model.config
    same_split = (own.split_seed, own.test_fraction) == (config.split_seed, data.test_fraction)
    if split == Split.TEST:
        if same_files and data.test_fraction and not same_split:
            raise UserError(
                f"{model.path} was trained with --test-fraction {own.test_fraction:g} and --seed {own.seed}: among "
                "other test images there would be some that it was trained on"
            )
    elif not _same_validation(model, data, config):
        raise UserError(
            f"{model.path}: the {split} split is a part of the files that a checkpoint was trained on; those in "
            f"{folder}, or the settings by which they are split, are others; evaluate --split test"
        )


def _described(data: DataFacts) -> str:
    return f"images of {list(data.image_shape)} (channels, height, width) in {data.num_classes} classes"


def with_code_given(config: Config, path: Path, code: Sequence[str], sha256: str | None = None) -> Config:
    """The settings in `path`, their `model` replaced by the user's own code where it is such.

    Args:
        code: as in `load_models`; one of them is for all, of several that of the same name is used.
        sha256: of the file that the network was trained with.

    Raises:
        UserError: it is not given.
    """
    if not is_own_code(config.model):
        return config
    given = list(code) if len(code) == 1 else [model for model in code if model == config.model]
    if not given:
        raise UserError(
            f"{path} is of a network of your own, whose code is never taken from a file: say where it is, such as "
            f"--model {short(named_again(config.model), 200)}"
        )
    source = ModelSource.parse(given[0])
    if sha256 not in (None, source.digest()):
        warn(f"--model {source} is not as it was when {path} was saved")
    return replace(config, model=given[0])


def _build(checkpoint: Checkpoint, views: int | None, world: World, code: Sequence[str]) -> TrainedModel:
    """The model of a checkpoint with the weights that are evaluated."""
    path, info, data = checkpoint.path, checkpoint.info, checkpoint.info.data
    config = info.config(path, **({} if views is None else {"views": views}))
    config = with_code_given(config, path, code, info.code_sha256)
    shape, num_classes = data.image_shape, data.num_classes
    if not is_own_code(config.model):
        try:
            with torch.device("meta"):  # without memory, of which settings could ask for any amount
                _check_weights(checkpoint, build_model(config, shape, num_classes))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError | NotInstalled):
                raise
            if "meta tensor" not in str(error):  # of which torchvision's RegNets take numbers
                raise CheckpointError(
                    f"{path}: its weights are not those of its settings, of which no network can be made ({error})"
                ) from None
    return _with_weights(checkpoint, config, build_model(config, shape, num_classes), world)


def _check_weights(checkpoint: Checkpoint, model: Classifier, hint: str = "") -> None:
    """Raise a CheckpointError if the weights do not fit a model."""
    weights, expected = evaluated_weights(checkpoint.arrays), model.state_dict()
    if different := difference(weights, expected):
        raise CheckpointError(f"{checkpoint.path}: its weights are not those of its settings: {different}{hint}")


def _with_weights(checkpoint: Checkpoint, config: Config, model: Classifier, world: World) -> TrainedModel:
    """A model with a checkpoint's evaluated weights, after a check that they fit and are finite."""
    is_own = is_own_code(config.model)
    hint = f"; --model {short(config.model, 200)} has to make the network as it was made for training" if is_own else ""
    _check_weights(checkpoint, model, hint)
    weights = {name: torch.from_numpy(array) for name, array in evaluated_weights(checkpoint.arrays).items()}
    if strange := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"{checkpoint.path}: its weights are not finite numbers ({strange[0]}); use an earlier checkpoint"
        )
    model.load_state_dict(weights)
    network = to_device(model, world.device).eval()
    return TrainedModel(checkpoint.path, checkpoint.info, config, network, checkpoint.sha256)


class Tested(NamedTuple):
    """A run's best model on the test set."""

    result: RunResult
    model: Classifier
    dataset: IdxDataset
    probabilities: np.ndarray | None  # (N, classes) float64, if asked for


def evaluate_best(
    plan: Plan,
    model: Classifier,
    world: World,
    on_batch: Callable[[], object],
    seconds: Callable[[], RunSeconds | None],
    ended: str,
) -> Tested:
    """Evaluate the best checkpoint of a run on the test set, in the run's own `model`; on one process by itself.

    `ended` is an `Ended`. `seconds` is asked once the result is there. With TensorBoard or `--log-to`, which show them,
    there are probabilities too.

    Raises:
        UserError: there is no checkpoint.
    """
    best, data = _with_weights(load_best(plan.run.path), plan.config, model, world), plan.data
    evaluated = EvaluatedSplit(data.test, data.class_names, data.test_fraction, _to_calibrate(data.validation))
    evaluation, logits = evaluate_models([best], Split.TEST, evaluated, world, on_batch)
    result = RunResult(**asdict(evaluation), seconds=seconds(), ended=Ended(ended))
    of_images = None
    if plan.config.tensorboard or plan.config.log_to:
        found = predict([best.network], data.test, world, on_batch) if logits is None else logits.double().softmax(1)
        of_images = found.numpy()
    return Tested(result, best.network, data.test, of_images)
