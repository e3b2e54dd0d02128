"""Builds and checks a run's network and loads its initial weights, before any communication between processes."""

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

SEED = " (torch.manual_seed before the module is built gives all ranks the same weights)"
NAMED = 8  # tensors listed as not loaded
PIXELS = ("pixel_mean", "pixel_std")  # statistics of a run's own images
MODULE = "module."  # prefix of the names of a wrapped module's tensors, here and in DDP
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """The model, the source of its weights, and the facts that must be the same on all ranks."""

    model: Classifier
    init: InitFacts | None
    facts: Mapping[str, str | None]
    notes: list[str]  # lines for the console
    exact: bool = True  # whether its results are the same on all ranks and reproducible


def prepare_rank(overrides: Overrides, module: nn.Module | None = None) -> tuple[Plan, Network]:
    """Return the plan of a run and its network, by `prepare` and `make_network`, on this rank."""
    world = World.from_environment()
    plan = prepare(overrides, world.size, resolve_precision)
    return plan, make_network(plan, world, module)


def make_network(plan: Plan, world: World, module: nn.Module | None = None) -> Network:
    """Build the network of a run, and check it unless it is the CNN; `module` replaces the one of `--model`.

    Raises:
        UserError: it cannot be trained, or is not exact as `--invariant` requires, or `--init` does not fit.
        Shortage: out of memory.
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
        compared = world.size > 1 and config.model != "cnn"  # the CNN's weights depend on the seed alone
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()} if compared else {}
        random_weights = arrays_digest(arrays)[:16]
        init, notes = _initialise(model, plan, warn if world.is_main else _say_nothing)
    facts = {
        "source": plan.code_digest,
        "--init file": init.sha256 if init else None,
        f"initial weights{'' if module is None else SEED}": random_weights,
    }
    return Network(model, init, facts, notes, exact=not inexact)


def _copy(module: nn.Module | None) -> nn.Module | None:
    """Return a copy to check, so that the module itself does not change."""
    try:
        return None if module is None else copy_network(module)
    except Exception as error:
        raise UserError(f"the network cannot be copied (copy.deepcopy), which evaluation needs: {error}") from None


def _tell(inexact: list[str], plan: Plan, world: World) -> None:
    """Warn of what is not exact about a network, and of changed code."""
    name = f"--model {plan.config.model}"
    if inexact and plan.config.invariant:
        raise UserError(f"--invariant needs an exact network; {name}: {inexact[0]}")
    if not world.is_main:
        return
    for sentence in inexact:
        warn(f"{name}: {sentence}; results depend on the number of processes, and on where a run is interrupted")
    if plan.started and plan.started.code_sha256 not in (None, plan.code_digest):
        warn(f"{name} has changed since the run in {plan.run.path} was saved; the run resumes with the current code")


def _initialise(model: Classifier, plan: Plan, tell: Warn) -> tuple[InitFacts | None, list[str]]:
    """Load the weights of `--init` unless the run resumes; return their source, and lines for the console."""
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
    """Warn if the file of `--init` has changed since the run started, which needs it no longer."""
    with suppress(OSError, UserError):
        file = load_best(path, _say_nothing).path if path.is_dir() else path
        if init and file.is_file() and file_sha256(file) != init.sha256:
            tell(
                f"--init {path} has changed since the run in {run_dir} started from it; the run resumes from its own "
                "checkpoint: to start from the changed file, give another --run-dir"
            )


def load_initial_weights(
    model: Classifier, path: Path, num_classes: int, tell: Warn = warn
) -> tuple[InitFacts, list[str]]:
    """Load those weights of another network that fit by name and shape; code is never loaded from the file.

    Args:
        path: a checkpoint (its EMA, if it has one), a run directory for its best one, or a safetensors file.
        tell: called with warnings.

    Returns:
        The source of the weights, and lines about which were loaded and which not.

    Raises:
        UserError: the file cannot be read, no tensor fits, or a number is not finite.
    """
    file, found = _read(path, tell)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in PIXELS}
    theirs = _named_as_in(own, found)
    fitting = _fitting(own, theirs)
    if not fitting:
        raise UserError(
            f"--init {path}: none of its tensors fits the network: the file has {_listed(theirs)}, the network has "
            f"{_listed(own)}; give the --model of the file, and the settings of its layers"
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
    """Return the file of `--init`, and its tensors."""
    if path.is_dir():
        best = load_best(path, tell)
        return best.path, _evaluated(best)
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        metadata, tensors = read_safetensors(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(
            f"--init {path}: this is neither a checkpoint nor a safetensors file ({error}). Files of torch.save "
            "(.pt, .pth, .bin) can run code when loaded: convert them with safetensors.torch.save_file"
        ) from None
    is_checkpoint = metadata.get("format", "").startswith(FORMAT.split("/")[0] + "/")
    return path, _evaluated(load_checkpoint(path)) if is_checkpoint else tensors


def read_safetensors(path: Path) -> tuple[Mapping[str, str], Tensors]:
    """Read metadata and tensors of a safetensors file; without a memory map, which some file systems lack.

    Raises:
        OSError, ValueError, KeyError, safetensors.SafetensorError: it cannot be read, or is not such a file.
    """
    content = path.read_bytes()
    tensors = dict(sorted(safetensors.torch.load(content).items()))  # load checks the header; its order is arbitrary
    header = parse(content[8 : 8 + int.from_bytes(content[:8], "little")], dict[str, object])
    return convert(header.get("__metadata__", {}), dict[str, str]), tensors


def _say_nothing(_: str) -> None:
    pass


def _evaluated(checkpoint: Checkpoint) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in evaluated_weights(checkpoint.arrays).items()}


def _named_as_in(own: Tensors, theirs: Tensors) -> Tensors:
    """Add or remove the prefix `module.` of wrapped networks, whichever makes most tensors fit."""
    changes: tuple[Callable[[str], str], ...] = (str, MODULE.__add__, lambda name: name.removeprefix(MODULE))
    versions = [{change(name): tensor for name, tensor in theirs.items()} for change in changes]
    best = max(versions, key=lambda tensors: (len(_fitting(own, tensors)), len(own.keys() & tensors.keys())))
    return {name: tensor for name, tensor in best.items() if name in own or name.removeprefix(MODULE) not in PIXELS}


def _fitting(own: Tensors, theirs: Tensors) -> list[str]:
    return [name for name, tensor in own.items() if name in theirs and _kind(theirs[name]) == _kind(tensor)]


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    """Return what must match to load a tensor; 16 and 32 bits are compatible."""
    return tensor.shape, tensor.is_floating_point()


def _reasons(model: Classifier, own: Tensors, theirs: Tensors, fitting: list[str], num_classes: int) -> list[str]:
    """List the tensors that are not loaded, with reasons, differing ones first; not those loaded under another name."""
    taken = {own[name].data_ptr() for name in fitting}
    named = dict(model.named_parameters(remove_duplicate=False))
    reasons = []
    for name, tensor in sorted(own.items(), key=lambda item: item[0] not in theirs):
        if name not in fitting and tensor.data_ptr() not in taken:
            frozen = name in named and not named[name].requires_grad
            why = _why(tensor, theirs.get(name), num_classes)
            reasons.append(f"{_known_as(name, model)}: {why}: newly initialised{', and frozen' if frozen else ''}")
    return reasons + [f"{_known_as(name, model)}: not in this network" for name in theirs if name not in own]


def _listed(tensors: Tensors) -> str:
    return short(", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())), 200)


def _why(own: torch.Tensor, theirs: torch.Tensor | None, num_classes: int) -> str:
    if theirs is None:
        return "not in the file"
    if own.shape == theirs.shape:
        return f"{theirs.dtype} in the file, {own.dtype} here".replace("torch.", "")
    if own.dim() and theirs.dim() and own.shape[0] == num_classes and own.shape[1:] == theirs.shape[1:]:
        return f"{theirs.shape[0]} classes in the file, {num_classes} here"
    return f"{tuple(theirs.shape)} in the file, {tuple(own.shape)} here"


def _known_as(name: str, model: Classifier) -> str:
    """Return a tensor's name as the user knows it."""
    return name if model.inner is model else name.removeprefix(MODULE)


def _compare_pixels(model: Classifier, found: Tensors, path: Path, tell: Warn) -> list[str]:
    """Compare the pixel normalisation with that of the loaded weights; report a difference, warn of a large one."""
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
            f"--init {path}: its network was trained on pixels normalised as {then}, and now gets {now}: give the "
            "--pixels that it was trained with"
        )
    return [f"          pixels normalised as {now}, by --pixels and this run's images; in the file as {then}"]


def _figures(values: torch.Tensor) -> str:
    figures = [f"{value:.4g}" for value in values.flatten().tolist()]
    return figures[0] if len(figures) == 1 else f"[{', '.join(figures)}]"
