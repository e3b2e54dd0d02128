"""From the paths of checkpoints to models in eval mode."""

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
    """A checkpoint's model in eval mode on its device, with the weights that are evaluated (the EMA, if there is one).

    `config` has the number of views by which it is evaluated, whatever its run was told.
    """

    path: Path
    info: CheckpointInfo
    config: Config
    network: Classifier
    sha256: str  # of the checkpoint


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
        if (one := described(first.info.data)) != (another := described(other.info.data)):
            raise UserError(
                f"{first.path} was trained on {one}, and {other.path} on {another}: they cannot be used together"
            )
    return [_build(checkpoint, views, world, code) for checkpoint in checkpoints]


def described(data: DataFacts) -> str:
    """The images and classes of a model's data, for an error."""
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
    return with_weights(checkpoint, config, build_model(config, shape, num_classes), world)


def _check_weights(checkpoint: Checkpoint, model: Classifier, hint: str = "") -> None:
    """Raise a CheckpointError if the weights do not fit a model."""
    weights, expected = evaluated_weights(checkpoint.arrays), model.state_dict()
    if different := difference(weights, expected):
        raise CheckpointError(f"{checkpoint.path}: its weights are not those of its settings: {different}{hint}")


def with_weights(checkpoint: Checkpoint, config: Config, model: Classifier, world: World) -> TrainedModel:
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
