"""Does a network keep the promises? Tried with a few images, before anything of a run begins.

What cannot be trained at all is an error. What would make a run depend on the number of its processes, or on where it
was interrupted, is named.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from dist_mnist.config.settings import Config
from dist_mnist.model.classifier import Classifier
from dist_mnist.model.layers.batch_norm import GlobalBatchNorm, synchronise_batch_norm
from dist_mnist.model.losses import per_sample_loss
from dist_mnist.model.source import ModelSource, users_code
from dist_mnist.utils.errors import UserError, short

IMAGES = 4  # that a network is tried with
TOLERANCE = 1e-3  # of the largest number; what is summed in another order differs by some 1e-6
STORABLE = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
            torch.bool}  # fmt: skip
Report = Callable[[str], None]
Outputs = list[tuple[str, torch.Tensor]]  # of modules, by name, in the order in which they are done


def check_model(make: Callable[[], Classifier], images: torch.Tensor, num_classes: int, config: Config) -> list[str]:
    """Check the network that `make` gives, which is not used for anything else.

    Args:
        images: (B, C, H, W) as they stand in the file, at least two.

    Returns:
        What is not exact about it, in sentences.

    Raises:
        UserError: it cannot be trained.
    """
    source = ModelSource.parse(config.model)
    what = f"--model {source}"
    threads = threading.active_count()
    model = make()
    synchronise_batch_norm(model, over_ranks=False)
    hint = source.size_hint(model.inner, config.model_args, *images.shape[2:])
    trial = _Trial(model, what, source.origin, images, hint)
    _check_parameters(model, what)
    logits = trial.logits(slice(None))
    _check_logits(logits, len(images), num_classes, what)
    _check_gradients(model, logits, what)
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        config.check_parts("a network without")
    if config.crop:
        edge = slice(config.crop, -config.crop)
        trial.forward(images[:, :, edge, edge], f"with --crop {config.crop} {what}")
    found: list[str] = []
    _find_randomness(trial, found.append)
    _find_state(trial, found.append)
    if not found:
        _find_mixing(trial, found.append)
    if (started := threading.active_count() - threads) > 0:
        found.append(f"it has started {started} {'thread' if started == 1 else 'threads'} of its own")
    return found


class _Trial:
    """A network and the images that it is tried with; each sample has a key for dropout."""

    def __init__(self, model: Classifier, what: str, origin: str, images: torch.Tensor, hint: str):
        self.model, self.what, self.origin, self.images, self.hint = model, what, origin, images, hint
        self.keys = torch.arange(len(images))

    def logits(self, samples: slice) -> torch.Tensor:
        """What the network makes of some of the samples."""
        with users_code(self.what, self.origin, self.hint):
            return self.model(self.images[samples], self.keys[samples])

    def forward(self, images: torch.Tensor, what: str) -> None:
        """Let the network see other images."""
        with users_code(what, self.origin), torch.no_grad():
            self.model(images, self.keys)


def _check_parameters(model: Classifier, what: str) -> None:
    named = dict(model.inner.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise UserError(f"{what} has no parameters to train{', as all are frozen' if named else ''}")
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{what}: its parameter {name} is {_dtype(parameter)}; parameters are float32, and --precision bf16 "
                "computes in 16 bits"
            )
    for name, buffer in model.state_dict().items():
        if buffer.dtype not in STORABLE:
            raise UserError(f"{what}: its buffer {name} is {_dtype(buffer)}, which a checkpoint cannot hold")


def _check_logits(logits: object, count: int, num_classes: int, what: str) -> None:
    expected = f"a network gives logits, a tensor ({count}, {num_classes}) of float32 for {count} images"
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"{what} gives a {type(logits).__name__}; {expected}")
    if tuple(logits.shape) != (count, num_classes) or not logits.is_floating_point():
        raise UserError(f"{what} gives a tensor {tuple(logits.shape)} of {_dtype(logits)}; {expected}")
    if not logits.isfinite().all():
        raise UserError(
            f"{what} gives logits that are not finite for the first training images: see its initial weights"
        )


def _check_gradients(model: Classifier, logits: torch.Tensor, what: str) -> None:
    named = {name: parameter for name, parameter in model.inner.named_parameters() if parameter.requires_grad}
    unused = list(named)
    if logits.requires_grad:
        losses = per_sample_loss(logits, torch.zeros(len(logits), dtype=torch.int64))
        with users_code(f"the backward pass of {what}"):
            gradients = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
        unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    if unused:
        first = ",".join(unused[:3])
        raise UserError(
            f"{what}: its logits do not depend on {short(', '.join(unused), 200)}: take {_them(unused)} out of the "
            f"network, or out of training: --freeze {first if len(unused) <= 3 else 'PATTERN'}"
        )


def _find_randomness(trial: _Trial, report: Report) -> None:
    """Random numbers that are not of the samples' keys; torch's own layers of dropout have become such."""
    others = _other_generators()
    drawing: list[str] = []
    with _watched(trial.model, torch.get_rng_state, lambda one, other: not one.equal(other), drawing):
        once, again = trial.logits(slice(None)), trial.logits(slice(None))
    if drawing:
        report(f"{drawing[0]} draws from torch's random number generator")
    elif others != _other_generators():
        report("it draws from Python's or numpy's random number generator")
    elif _apart(once, again):
        report("it gives other logits each time that it is given the same images")


def _other_generators() -> object:
    """The states of Python's and numpy's generators, to be compared."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tobytes(), state["pos"]


def _find_state(trial: _Trial, report: Report) -> None:
    """What a forward pass leaves behind, and the next, in another process or after a restart, would not find."""
    buffers = {name: buffer.clone() for name, buffer in trial.model.named_buffers()}
    attributes = _attributes(trial.model)
    trial.logits(slice(None))
    for name, buffer in trial.model.named_buffers():
        if not buffer.equal(buffers[name]):
            report(f"its forward pass changes the buffer {name.removeprefix('module.')}")
            return
    after = _attributes(trial.model)
    if changed := [name for name, value in after.items() if not _same(attributes.get(name, value), value)]:
        report(f"its forward pass changes {changed[0]}, which no checkpoint holds")


def _find_mixing(trial: _Trial, report: Report) -> None:
    """Layers by which a sample's logits depend on the others in its batch, batch normalisation aside."""
    parts = [slice(0, 1), slice(1, None)]
    for mode in ("eval", "train"):
        trial.model.train(mode == "train")
        for layer in trial.model.modules():
            if isinstance(layer, GlobalBatchNorm):
                layer.eval()
        whole: Outputs = []
        pieces: Outputs = []
        try:
            with torch.no_grad():
                with _recorded(trial.model, whole):
                    together = trial.logits(slice(None))
                with _recorded(trial.model, pieces):
                    apart = torch.cat([trial.logits(part) for part in parts])
        except UserError as error:
            report(f"it fails with one sample alone ({error})")
            break
        if _apart(together, apart):
            report(f"{_first_apart(whole, pieces)} mixes the samples of a batch in {mode} mode")
            break
    trial.model.train()


def _first_apart(whole: Outputs, pieces: Outputs) -> str:
    """The first module whose output differs between a whole batch and its parts, from the outputs in their order."""
    count = len(whole)
    if len(pieces) == 2 * count:
        for (name, together), (_, one), (_, other) in zip(whole, pieces[:count], pieces[count:], strict=True):
            if len(one) + len(other) == len(together) and _apart(together, torch.cat([one, other])):
                return name
    return "something in it"


def _apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not (one - other).abs().max() <= TOLERANCE * one.abs().max()


@contextmanager
def _watched(
    model: Classifier, state: Callable[[], torch.Tensor], differ: Callable[..., bool], found: list[str]
) -> Iterator[None]:
    """Note the innermost modules whose forward pass changes a state, for a `with` block."""
    before: list[torch.Tensor] = []

    def begins(*_: object) -> None:
        before.append(state())

    def ends(module: nn.Module, *_: object) -> None:
        if differ(before.pop(), state()) and not found:
            found.append(names[module])

    names, handles = _names(model), []
    for module in names:
        handles += [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded(model: Classifier, outputs: Outputs) -> Iterator[None]:
    """Note the tensors that modules give, with their names, for a `with` block."""
    names = _names(model)

    def ends(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() and output.is_floating_point():
            outputs.append((names[module], output))

    handles = [module.register_forward_hook(ends) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _names(model: Classifier) -> dict[nn.Module, str]:
    """The modules of a network, named for a person."""
    return {
        module: f"{type(module).__name__} ({name})" if name else type(module).__name__
        for name, module in model.inner.named_modules()
    }


def _attributes(model: Classifier) -> dict[str, tuple[object, int | None]]:
    """What modules hold beside parameters, buffers and modules, by name; with the length of what can grow."""
    found = {}
    for name, module in model.inner.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in INSIDES:
                length = len(value) if isinstance(value, list | dict | set) else None
                found[f"{name}.{attribute}".lstrip(".")] = value, length
    return found


def _same(one: tuple[object, int | None], other: tuple[object, int | None]) -> bool:
    """Whether an attribute is as it was: the same object, unless it is a number or a string, and as long."""
    plain = isinstance(one[0], int | float | str)
    return one[1] == other[1] and (one[0] == other[0] if plain else one[0] is other[0])


INSIDES = frozenset(vars(nn.Module()))


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
