"""Builds a run's network from its settings."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn.parameter import is_lazy

from dist_mnist.config.settings import Config, is_own_code
from dist_mnist.model.augment.affine import RandomAffine
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
    """Build the network that `config` describes, in train mode; without pixel statistics, for weights that hold them.

    Args:
        module: replaces the network that `--model` names, and keeps its weights.

    Raises:
        UserError: the user's code returns no usable network, or a pattern of `--freeze` matches nothing.
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
            strided_stages=config.strided_stages,
            conv_layers=config.conv_layers,
            kernel_size=config.kernel_size,
            padding=config.padding,
            dense_units=config.dense_units,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            pool_first=config.pool_first,
            weight_init=config.weight_init,
            pixel_mean=mean,
            pixel_std=std,
            views=views,
            warp=warp,
            seed=config.seed,
        )
    else:
        source = ModelSource.parse(config.model)
        make = source.load(image_shape, num_classes, config.model_args) if module is None else lambda: module
        with _seeded(config.seed):
            model = Wrapped(make(), image_shape, mean, std, views=views, warp=warp)
            _materialise(model, source)
        key_dropout(model)
    freeze(model, config.freeze)
    channels_last = config.channels_last and _lay_out_channels_last(model, is_own_code(config.model))
    if isinstance(model, Wrapped):
        model.channels_last = channels_last
    return model


def freeze(model: Classifier, patterns: str) -> None:
    """Freeze the parameters whose names match one of the `patterns`, and the running statistics of their layers.

    Args:
        patterns: shell patterns, separated by commas: `stages.*,head.bias`.

    Raises:
        UserError: a pattern matches nothing, or all parameters would be frozen.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    parameters = list(model.inner.named_parameters(remove_duplicate=False))
    norms = [(name, layer) for name, layer in model.inner.named_modules() if _running_mean(layer) is not None]
    names = [name for name, _ in parameters] + [f"{name}.running_mean" for name, _ in norms]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--freeze {pattern} matches no parameter; the names are {short(', '.join(names), 300)}")

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in wanted)

    for name, parameter in parameters:
        if matches(name):
            parameter.requires_grad_(False)
    if wanted and not model.trained_parameters():
        raise UserError(
            f"--freeze {patterns} leaves no parameter to train: omit a pattern, such as the one for the head"
        )
    for name, layer in norms:
        own = [parameter_name for parameter_name, _ in layer.named_parameters(name, recurse=False)]
        if matches(f"{name}.running_mean") or (own and all(map(matches, own))):
            model.frozen_norms.append(layer)
    model.train()


def _running_mean(layer: nn.Module) -> object:
    return getattr(layer, "running_mean", None)


def _lay_out_channels_last(model: Classifier, is_own: bool) -> bool:
    """Convert weights to channels-last, if the network supports it; `x.view(len(x), -1)`, which is common, does not.

    torch has this memory format for 4D tensors only, not for those of Conv3d.
    """
    if any(parameter.dim() > 4 for parameter in model.parameters()):
        return False
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        if is_own:
            _run_blank_images(model, "")
    except UserError:  # if channels-last is not the reason, the check reports it
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    return True


@torch.no_grad()
def _run_blank_images(model: Classifier, what: str, origin: str = "") -> None:
    """Run a forward pass on two blank images, channels-last as the loader's, in eval mode; UserError if it fails."""
    channels, height, width = model.image_shape
    try:
        with users_code(what, origin):
            model.eval()(torch.zeros(2, height, width, channels).permute(0, 3, 1, 2))
    finally:
        model.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python for a `with` block; restore them afterwards.

    torch's generator makes the initial weights; a network's constructor may use the others, too.
    """
    key = key_of("init", seed) & (1 << 63) - 1
    others = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        np.random.seed(key % 2**32)
        random.seed(key)
        try:
            yield
        finally:
            np.random.set_state(others[0])
            random.setstate(others[1])


def _materialise(model: Wrapped, source: ModelSource) -> None:
    """Run two blank images through a network that may need them to create lazy parameters or buffers."""
    model.channels_last = False
    is_lazy_one = any(map(is_lazy, [*model.parameters(), *model.buffers()]))
    if source.is_own or is_lazy_one:
        try:
            _run_blank_images(model, f"--model {source}", source.origin)
        except UserError:
            if is_lazy_one:
                raise  # otherwise the check reports more
        if lazy := [name for name, parameter in model.inner.named_parameters() if is_lazy(parameter)]:
            raise UserError(f"--model {source}: the forward pass does not use its lazy parameter {lazy[0]}; remove it")
