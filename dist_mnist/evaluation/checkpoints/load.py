"""Models in eval mode, loaded from checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_mnist.config.settings import Config, is_own_code, named_again
from dist_mnist.distributed.world import World
from dist_mnist.model.build import build_model
from dist_mnist.model.classifier import Classifier, to_device
from dist_mnist.model.source import ModelSource, NotInstalled
from dist_mnist.run.checkpoints.file import Checkpoint, CheckpointError, difference, evaluated_weights
from dist_mnist.run.checkpoints.store import load_best
from dist_mnist.run.records import CheckpointInfo, DataFacts
from dist_mnist.utils.errors import UserError, short, warn


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model in eval mode on its device, with the evaluated weights (the EMA, if there is one).

    `config.views` is the number of TTA views it is evaluated with, which may differ from its run's setting.
    """

    path: Path
    info: CheckpointInfo
    config: Config
    network: Classifier
    sha256: str  # of the checkpoint


def load_models(
    paths: Sequence[Path], world: World, views: int | None = None, code: Sequence[str] = ()
) -> list[TrainedModel]:
    """Load the models of checkpoints that are used together.

    Args:
        paths: checkpoint files, or run directories for the best checkpoint of each.
        views: number of views of each image whose predictions are averaged (TTA); None for each run's setting.
        code: the user's own networks, as for `--model`: code is never loaded from a checkpoint.

    Raises:
        UserError: a checkpoint cannot be read, image shapes or classes differ, or the code of a network is not given.
    """
    checkpoints = [load_best(path) for path in paths]
    first, *others = checkpoints
    for other in others:
        if (one := described(first.info.data)) != (another := described(other.info.data)):
            raise UserError(
                f"{first.path} was trained on {one}, and {other.path} on {another}: they cannot be used together"
            )
    return [_build(checkpoint, views, world, code) for checkpoint in checkpoints]


def described(data: DataFacts) -> str:
    """Describe the images and classes of a model's data, for an error."""
    return f"images of {list(data.image_shape)} (channels, height, width) in {data.num_classes} classes"


def with_code_given(config: Config, path: Path, code: Sequence[str], sha256: str | None = None) -> Config:
    """Return the settings from `path`; if the network is the user's own, `model` is replaced by the given code.

    Args:
        code: as for `load_models`; a single one applies to all checkpoints, of several the one with the same name.
        sha256: digest of the source file that the network was trained with.

    Raises:
        UserError: the code is not given.
    """
    if not is_own_code(config.model):
        return config
    given = list(code) if len(code) == 1 else [model for model in code if model == config.model]
    if not given:
        raise UserError(
            f"{path} holds a network of your own, whose code is never loaded from a file: say where it is, such as "
            f"--model {short(named_again(config.model), 200)}"
        )
    source = ModelSource.parse(given[0])
    if sha256 not in (None, source.digest()):
        warn(f"--model {source} has changed since {path} was saved")
    return replace(config, model=given[0])


def _build(checkpoint: Checkpoint, views: int | None, world: World, code: Sequence[str]) -> TrainedModel:
    """Build a checkpoint's model, with the evaluated weights."""
    path, info, data = checkpoint.path, checkpoint.info, checkpoint.info.data
    config = info.config(path, **({} if views is None else {"views": views}))
    config = with_code_given(config, path, code, info.code_sha256)
    shape, num_classes = data.image_shape, data.num_classes
    if not is_own_code(config.model):
        try:
            with torch.device("meta"):  # allocates nothing: settings could ask for any amount of memory
                _check_weights(checkpoint, build_model(config, shape, num_classes))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError | NotInstalled):
                raise
            if "meta tensor" not in str(error):  # torchvision's RegNets read tensor values, which meta tensors lack
                raise CheckpointError(
                    f"{path}: its weights do not match its settings, which give no valid network ({error})"
                ) from None
    return with_weights(checkpoint, config, build_model(config, shape, num_classes), world)


def _check_weights(checkpoint: Checkpoint, model: Classifier, hint: str = "") -> None:
    """Raise a CheckpointError if the weights do not fit a model."""
    weights, expected = evaluated_weights(checkpoint.arrays), model.state_dict()
    if different := difference(weights, expected):
        raise CheckpointError(f"{checkpoint.path}: its weights do not match its settings: {different}{hint}")


def with_weights(checkpoint: Checkpoint, config: Config, model: Classifier, world: World) -> TrainedModel:
    """Load a checkpoint's evaluated weights into a model, after checking that they fit and are finite."""
    is_own = is_own_code(config.model)
    hint = f"; --model {short(config.model, 200)} must build the same network as in training" if is_own else ""
    _check_weights(checkpoint, model, hint)
    weights = {name: torch.from_numpy(array) for name, array in evaluated_weights(checkpoint.arrays).items()}
    if strange := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"{checkpoint.path}: its weights are NaN or infinite ({strange[0]}); use an earlier checkpoint"
        )
    model.load_state_dict(weights)
    network = to_device(model, world.device).eval()
    return TrainedModel(checkpoint.path, checkpoint.info, config, network, checkpoint.sha256)
