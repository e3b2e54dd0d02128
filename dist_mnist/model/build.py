"""A run's network, made of its settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn.parameter import is_lazy

from dist_mnist.config.settings import Config, is_own_code
from dist_mnist.model.augment import RandomAffine
from dist_mnist.model.classifier import Classifier, Wrapped
from dist_mnist.model.families.cnn import CNN
from dist_mnist.model.layers.dropout import key_dropout
from dist_mnist.model.source import ModelSource, users_code
from dist_mnist.model.stateless_rng import key_of
from dist_mnist.utils.errors import UserError, short


def build_model(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    pixel_mean: ArrayLike | None = None,
    pixel_std: ArrayLike | None = None,
    module: nn.Module | None = None,
) -> Classifier:
    """The network that `config` describes, in train mode; without pixel statistics, for weights that bring their own.

    Args:
        module: takes the place of what `--model` names, with the weights that it has.

    Raises:
        UserError: the user's own code does not give such a network, or nothing is called as `--freeze` says.
    """
    mean = [0.0] * image_shape[0] if pixel_mean is None else pixel_mean
    std = [1.0] * image_shape[0] if pixel_std is None else pixel_std
    views, warp = config.views, RandomAffine.of(config)
    model: Classifier
    if module is None and config.model == "cnn":
        model = CNN(
            image_shape,
            num_classes,
            conv_channels=config.conv_channels,
            conv_layers=config.conv_layers,
            kernel_size=config.kernel_size,
            dense_units=config.dense_units,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            pixel_mean=mean,
            pixel_std=std,
            views=views,
            warp=warp,
            seed=config.seed,
        )
    else:
        with _seeded(config.seed):
            if module is None:
                module = ModelSource.parse(config.model).build(image_shape, num_classes, config.model_args)
            model = Wrapped(module, image_shape, mean, std, views=views, warp=warp)
            _materialise(model, f"--model {config.model}")
        key_dropout(model)
        model.channels_last = config.channels_last and (not is_own_code(config.model) or _takes_channels_last(model))
    freeze(model, config.freeze)
    wanted = model.channels_last if isinstance(model, Wrapped) else config.channels_last
    wanted = wanted and all(parameter.dim() < 5 for parameter in model.parameters())  # torch refuses such, as Conv3d's
    return model.to(memory_format=torch.channels_last) if wanted else model  # type: ignore[call-overload]


def freeze(model: Classifier, patterns: str) -> None:
    """Keep parameters as they are, and running statistics beside them, whose names match one of the `patterns`.

    Args:
        patterns: as those of a shell, with commas between them: `stages.*,head.bias`.

    Raises:
        UserError: one of them matches nothing, or all parameters are frozen.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    parameters = list(model.inner.named_parameters(remove_duplicate=False))
    norms = [(name, layer) for name, layer in model.inner.named_modules() if _running_mean(layer) is not None]
    names = [name for name, _ in parameters] + [f"{name}.running_mean" for name, _ in norms]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--freeze {pattern} matches no parameter; there are {short(', '.join(names), 300)}")

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in wanted)

    for name, parameter in parameters:
        if matches(name):
            parameter.requires_grad_(False)
    if wanted and not model.trained_parameters():
        raise UserError(
            f"--freeze {patterns} leaves no parameter to train: leave out the pattern of some, as the head's"
        )
    for name, layer in norms:
        own = [parameter_name for parameter_name, _ in layer.named_parameters(name, recurse=False)]
        if matches(f"{name}.running_mean") or (own and all(map(matches, own))):
            model.frozen_norms.append(layer)
    model.train()


def _running_mean(layer: nn.Module) -> object:
    return getattr(layer, "running_mean", None)


@torch.no_grad()
def _takes_channels_last(model: Classifier) -> bool:
    """Whether a network can use images in that memory order: `x.view(len(x), -1)`, which many have, cannot."""
    try:
        model.eval()(torch.zeros(2, *model.image_shape).to(memory_format=torch.channels_last))
    except (Exception, SystemExit):  # which the check will tell
        return False
    finally:
        model.train()
    return True


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let torch's generator begin at a run's seed, for initial weights within a `with` block; then as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of("init", seed) & (1 << 63) - 1)
        yield


@torch.no_grad()
def _materialise(model: Classifier, what: str) -> None:
    """Give lazy modules, which learn their sizes from a first batch, one of blank images."""
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        with users_code(what):
            model.eval()(torch.zeros(2, *model.image_shape))
        if lazy := [name for name, parameter in model.inner.named_parameters() if is_lazy(parameter)]:
            raise UserError(f"{what}: the forward pass does not come to its lazy parameter {lazy[0]}; take it out")
