"""A run's network before its first step: built, checked, given its initial weights; no processes have met yet."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from msgspec import convert
from torch import nn

from dist_mnist.config.overrides import Overrides
from dist_mnist.distributed.device import resolve_precision
from dist_mnist.distributed.world import World, counted
from dist_mnist.model.build import build_model
from dist_mnist.model.check import IMAGES, check_model
from dist_mnist.model.classifier import Classifier, copy_network
from dist_mnist.run.checkpoints.file import FORMAT, Checkpoint, arrays_digest, evaluated_weights, load_checkpoint
from dist_mnist.run.checkpoints.store import Warn, load_best
from dist_mnist.run.plan import Plan, prepare
from dist_mnist.run.records import InitFacts
from dist_mnist.utils.errors import UserError, named_out_of_memory, printable, short, warn
from dist_mnist.utils.files import file_sha256, path_text
from dist_mnist.utils.schema import parse

SEED = " (torch.manual_seed before a module is made gives all ranks the same)"
NAMED = 8  # of the tensors that are not taken
PIXELS = ("pixel_mean", "pixel_std")  # which are of a run's own images
MODULE = "module."  # before the names of a wrapped module's tensors, here and in DDP
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """The model, where its weights come from, and what of it has to be alike on all ranks."""

    model: Classifier
    init: InitFacts | None
    facts: Mapping[str, str | None]
    notes: list[str]  # lines for the person who watches
    exact: bool = True  # whether it computes the same on any rank, and again


def prepare_rank(overrides: Overrides, module: nn.Module | None = None) -> tuple[Plan, Network]:
    """The plan of a run, and its network, as `prepare` and `make_network` give them to this rank."""
    world = World.from_environment()
    plan = prepare(overrides, world.size, resolve_precision)
    return plan, make_network(plan, world, module)


def make_network(plan: Plan, world: World, module: nn.Module | None = None) -> Network:
    """The network of a run, checked unless it is the CNN; `module` takes the place of `--model`'s.

    Raises:
        UserError: it cannot be trained, or is not exact where `--invariant` asks for that, or `--init` does not fit.
        Shortage: it takes more memory than there is.
    """
    config, train = plan.config, plan.data.train
    scaling = train.pixel_scaling(config.pixels)
    build = partial(build_model, config, train.image_shape, plan.data.num_classes, *scaling)
    inexact: list[str] = []
    with named_out_of_memory():
        if module is not None or config.model != "cnn":
            images = torch.from_numpy(train.__getitems__(np.arange(IMAGES) % len(train)).images).permute(0, 3, 1, 2)
            inexact = check_model(partial(build, _copy(module)), images, plan.data.num_classes, config)
            _tell(inexact, plan, world)
        model = build(module)
        compared = world.size > 1 and config.model != "cnn"  # whose weights are a function of the seed alone
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()} if compared else {}
        random_weights = arrays_digest(arrays)[:16]
        init, notes = _initialise(model, plan, warn if world.is_main else _say_nothing)
    facts = {
        "source": plan.code_digest,
        "starting from": init.sha256 if init else None,
        f"initial weights{'' if module is None else SEED}": random_weights,
    }
    return Network(model, init, facts, notes, exact=not inexact)


def _copy(module: nn.Module | None) -> nn.Module | None:
    """One to be tried, while the other stays as it is."""
    try:
        return None if module is None else copy_network(module)
    except Exception as error:
        raise UserError(f"the network cannot be copied, which evaluation needs ({error})") from None


def _tell(inexact: list[str], plan: Plan, world: World) -> None:
    """Name what is not exact about a network, and whether its code has changed."""
    name = f"--model {plan.config.model}"
    if inexact and plan.config.invariant:
        raise UserError(f"--invariant needs a network that is exact, and of {name} {inexact[0]}")
    if not world.is_main:
        return
    for sentence in inexact:
        warn(f"{name}: {sentence}; results depend on the number of processes, and on where a run is interrupted")
    if plan.started and plan.started.code_sha256 not in (None, plan.code_digest):
        warn(
            f"{name} is not as it was when the run in {plan.run.path} was saved: it goes on with the code as it is now"
        )


def _initialise(model: Classifier, plan: Plan, tell: Warn) -> tuple[InitFacts | None, list[str]]:
    """Where a run's first weights come from, taken from there unless it resumes; and what is told of the weights."""
    config, started = plan.config, plan.started
    init, notes = started.init if started else None, list[str]()
    if config.init and started:
        _tell_if_changed(config.init, init, plan.run.path, tell)
    elif config.init:
        init, notes = load_initial_weights(model, config.init, plan.data.num_classes, tell)
    if frozen := [parameter for parameter in model.parameters() if not parameter.requires_grad]:
        fixed = sum(parameter.numel() for parameter in frozen) / model.num_parameters()
        layers = counted(len(model.frozen_norms), "layer")
        notes.append(f"frozen    {fixed:.1%} of the parameters, and the running statistics of {layers}")
    return init, notes


def _tell_if_changed(path: Path, init: InitFacts | None, run_dir: Path, tell: Warn) -> None:
    """The file that a run started from is not needed again; that it is another by now may come as a surprise."""
    with suppress(OSError, UserError):
        file = load_best(path, _say_nothing).path if path.is_dir() else path
        if init and file.is_file() and file_sha256(file) != init.sha256:
            tell(
                f"--init {path} has changed since the run in {run_dir} started from it, which goes on from its own "
                "weights: to start from what is there now, give another --run-dir"
            )


def load_initial_weights(
    model: Classifier, path: Path, num_classes: int, tell: Warn = warn
) -> tuple[InitFacts, list[str]]:
    """Give a network the weights of another that fit it by name and shape. No network is made of what a file says.

    Args:
        path: a checkpoint, a run directory for its best, or a safetensors file; of a checkpoint with an EMA, that.
        tell: is told what deserves a look.

    Returns:
        Where they come from, and what was taken and what not, in lines.

    Raises:
        UserError: it cannot be read, nothing fits, or a number is not finite.
    """
    file, found = _read(path, tell)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in PIXELS}
    theirs = _named_as_in(own, found)
    fitting = _fitting(own, theirs)
    if not fitting:
        raise UserError(
            f"--init {path}: none of its tensors fits the network: it has {_listed(theirs)}, and the network "
            f"{_listed(own)}; give the --model that it is of, and the settings of its layers"
        )
    for name in fitting:
        values = theirs[name].to(own[name].dtype)
        if not values.isfinite().all():
            raise UserError(f"--init {path}: its {_known_as(name, model)} has numbers that are not finite")
        own[name].copy_(values)
    reasons = _reasons(model, own, theirs, fitting, num_classes)
    numbers, taken = (sum(own[name].numel() for name in names) for names in (own, fitting))
    lines = [f"init      {len(fitting)} of {len(own)} tensors ({taken / numbers:.1%} of the numbers) from {file}"]
    lines += [f"          {reason}" for reason in reasons[:NAMED]]
    lines += [f"          and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
    lines += _compare_pixels(model, found, path, tell)
    return InitFacts(path=path_text(file), sha256=file_sha256(file)), list(map(printable, lines))


def _read(path: Path, tell: Warn) -> tuple[Path, Tensors]:
    """The file that `--init` means, and its tensors."""
    if path.is_dir():
        best = load_best(path, tell)
        return best.path, _evaluated(best)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        metadata, tensors = read_safetensors(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(
            f"--init {path}: this is neither a checkpoint nor a safetensors file ({error}). What torch.save wrote "
            "(.pt, .pth, .bin) can run code when it is loaded: write its tensors anew by safetensors.torch.save_file"
        ) from None
    is_checkpoint = metadata.get("format", "").startswith(FORMAT.split("/")[0] + "/")
    return path, _evaluated(load_checkpoint(path)) if is_checkpoint else tensors


def read_safetensors(path: Path) -> tuple[Mapping[str, str], Tensors]:
    """Metadata and tensors of a safetensors file; it is not mapped, which not every file system can do.

    Raises:
        OSError, ValueError, KeyError, safetensors.SafetensorError: it cannot be read, or is none.
    """
    content = path.read_bytes()
    tensors = dict(sorted(safetensors.torch.load(content).items()))  # checks the header; gives them in any order
    header = parse(content[8 : 8 + int.from_bytes(content[:8], "little")], dict[str, object])
    return convert(header.get("__metadata__", {}), dict[str, str]), tensors


def _say_nothing(_: str) -> None:
    pass


def _evaluated(checkpoint: Checkpoint) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in evaluated_weights(checkpoint.arrays).items()}


def _named_as_in(own: Tensors, theirs: Tensors) -> Tensors:
    """Tensors under the names by which most of them fit: with `module.` before them, as in wrapped networks, or not."""
    changes: tuple[Callable[[str], str], ...] = (str, MODULE.__add__, lambda name: name.removeprefix(MODULE))
    versions = [{change(name): tensor for name, tensor in theirs.items()} for change in changes]
    best = max(versions, key=lambda tensors: (len(_fitting(own, tensors)), len(own.keys() & tensors.keys())))
    return {name: tensor for name, tensor in best.items() if name in own or name.removeprefix(MODULE) not in PIXELS}


def _fitting(own: Tensors, theirs: Tensors) -> list[str]:
    return [name for name, tensor in own.items() if name in theirs and _kind(theirs[name]) == _kind(tensor)]


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    """What has to be the same for a tensor to be taken; 16 bits and 32 go together."""
    return tensor.shape, tensor.is_floating_point()


def _reasons(model: Classifier, own: Tensors, theirs: Tensors, fitting: list[str], num_classes: int) -> list[str]:
    """What is not taken, and why, the more telling first; a tensor with a second name by which it is taken is not."""
    taken = {own[name].data_ptr() for name in fitting}
    named = dict(model.named_parameters(remove_duplicate=False))
    reasons = []
    for name, tensor in sorted(own.items(), key=lambda item: item[0] not in theirs):
        if name not in fitting and tensor.data_ptr() not in taken:
            frozen = name in named and not named[name].requires_grad
            why = _why(tensor, theirs.get(name), num_classes)
            reasons.append(f"{_known_as(name, model)}: {why}: fresh{', and frozen so' if frozen else ''}")
    return reasons + [f"{_known_as(name, model)}: not in this network" for name in theirs if name not in own]


def _listed(tensors: Tensors) -> str:
    return short(", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())), 200)


def _why(own: torch.Tensor, theirs: torch.Tensor | None, num_classes: int) -> str:
    if theirs is None:
        return "not there"
    if own.shape == theirs.shape:
        return f"{theirs.dtype} there, {own.dtype} here".replace("torch.", "")
    if own.dim() and theirs.dim() and own.shape[0] == num_classes and own.shape[1:] == theirs.shape[1:]:
        return f"{theirs.shape[0]} classes there, {num_classes} here"
    return f"{tuple(theirs.shape)} there, {tuple(own.shape)} here"


def _known_as(name: str, model: Classifier) -> str:
    """A tensor's name as its user knows it."""
    return name if model.inner is model else name.removeprefix(MODULE)


def _compare_pixels(model: Classifier, found: Tensors, path: Path, tell: Warn) -> list[str]:
    """How pixels are normalised now, and were for the weights, if that is not the same; what is of another order
    deserves a look.
    """
    both = (model.state_dict(), found)
    here, there = ([named.get(name, torch.empty(0)).float() for name in PIXELS] for named in both)
    if any(one.shape != other.shape for one, other in zip(here, there, strict=True)):
        return []
    (mean, std), (their_mean, their_std) = here, there
    ratio = std / their_std
    if not ((ratio - 1).abs() > 0.01).any() and not ((mean - their_mean).abs() > 0.01 * std).any():
        return []
    now, then = (f"(x - {_figures(mean)}) / {_figures(std)}" for mean, std in (here, there))
    if ((ratio > 2) | (ratio < 0.5)).any():
        tell(
            f"--init {path}: its network is used to pixels x as {then}, and gets {now}: give the --pixels that it was "
            "trained with"
        )
    return [f"          pixels x enter as {now}, by this run's --pixels and images; there as {then}"]


def _figures(values: torch.Tensor) -> str:
    figures = [f"{value:.4g}" for value in values.flatten().tolist()]
    return figures[0] if len(figures) == 1 else f"[{', '.join(figures)}]"
