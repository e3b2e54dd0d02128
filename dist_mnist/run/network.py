"""A run's network before its first step: built, checked, given its initial weights; no processes have met yet."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from dist_mnist.config.overrides import Overrides
from dist_mnist.distributed.device import resolve_precision
from dist_mnist.distributed.world import World
from dist_mnist.model.build import build_model
from dist_mnist.model.check import IMAGES, check_model
from dist_mnist.model.classifier import Classifier
from dist_mnist.run.checkpoint import FORMAT, arrays_digest, evaluated_weights, load_checkpoint
from dist_mnist.run.checkpoint_store import load_best
from dist_mnist.run.plan import Plan, prepare
from dist_mnist.run.records import InitFacts
from dist_mnist.utils.errors import UserError, named_out_of_memory, short, warn

NAMED = 8  # of the tensors that are not taken
PIXELS = ("pixel_mean", "pixel_std")  # which are of a run's own images
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """The model, where its weights come from, and what of it has to be alike on all ranks."""

    model: Classifier
    init: InitFacts | None
    facts: Mapping[str, str | None]
    notes: list[str]  # lines for the person who watches


def prepare_rank(overrides: Overrides, world: World, module: nn.Module | None = None) -> tuple[Plan, Network]:
    """The plan of a run, and its network, as `prepare` and `make_network` give them."""
    plan = prepare(overrides, world.size, resolve_precision)
    return plan, make_network(plan, world, module)


def make_network(plan: Plan, world: World, module: nn.Module | None = None) -> Network:
    """The network of a run, checked unless it is of this package; `module` takes the place of `--model`'s.

    Raises:
        UserError: it cannot be trained, or is not exact where `--invariant` asks for that, or `--init` does not fit.
        Shortage: it takes more memory than there is.
    """
    config, train = plan.config, plan.data.train
    scaling = train.pixel_scaling(config.pixels)
    build = partial(build_model, config, train.image_shape, plan.data.num_classes, *scaling)
    with named_out_of_memory():
        if module is not None or ":" in config.model:
            images = torch.from_numpy(train.__getitems__(np.arange(IMAGES) % len(train)).images).permute(0, 3, 1, 2)
            inexact = check_model(partial(build, _copy(module)), images, plan.data.num_classes, config)
            _tell(inexact, plan, world)
        model = build(module)
        init, notes = plan.started.init if plan.started else None, list[str]()
        if config.init and not plan.started:
            init, notes = load_initial_weights(model, config.init, plan.data.num_classes)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()} if config.model != "cnn" else {}
    facts = {
        "source": plan.code_digest,
        "starting from": init.sha256 if init else None,
        "initial weights": arrays_digest(arrays)[:16],
    }
    return Network(model, init, facts, notes)


def _copy(module: nn.Module | None) -> nn.Module | None:
    """One to be tried, while the other stays as it is."""
    try:
        return copy.deepcopy(module)
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


def load_initial_weights(model: Classifier, path: Path, num_classes: int) -> tuple[InitFacts, list[str]]:
    """Give a network the weights of another that fit it by name and shape. No network is made of what a file says.

    Args:
        path: a checkpoint, a run directory for its best, or a safetensors file; of a checkpoint with an EMA, that.

    Returns:
        Where they come from, and what was taken and what not, in lines.

    Raises:
        UserError: it cannot be read, nothing fits, or a number is not finite.
    """
    file, found = _read(path)
    theirs = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    own = {name: tensor for name, tensor in model.inner.state_dict().items() if name not in PIXELS}
    fitting = [name for name, tensor in own.items() if name in theirs and theirs[name].shape == tensor.shape]
    if not fitting:
        raise UserError(
            f"--init {path}: none of its tensors fits the network. The file has {short(', '.join(theirs), 200)}; the "
            f"network has {short(', '.join(own), 200)}"
        )
    for name in fitting:
        if not theirs[name].isfinite().all():
            raise UserError(f"--init {path}: its {name} has numbers that are not finite")
        own[name].copy_(theirs[name])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return InitFacts(path=str(path), sha256=digest), _told(path, own, theirs, fitting, num_classes)


def _read(path: Path) -> tuple[Path, Tensors]:
    """The file that `--init` means, and its tensors."""
    if path.is_dir():
        best = load_best(path)
        return best.path, {name: torch.from_numpy(array) for name, array in evaluated_weights(best.arrays).items()}
    try:
        with safetensors.safe_open(path, "pt") as file:
            is_checkpoint = (file.metadata() or {}).get("format", "").startswith(FORMAT.split("/")[0] + "/")
        if not is_checkpoint:
            return path, safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"--init {path}: there is no such file or run directory") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--init {path}: this is neither a checkpoint nor a safetensors file ({error})") from None
    arrays = evaluated_weights(load_checkpoint(path).arrays)
    return path, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _told(path: Path, own: Tensors, theirs: Tensors, fitting: list[str], num_classes: int) -> list[str]:
    """What was taken, what was not and why."""
    numbers, taken = (sum(own[name].numel() for name in names) for names in (own, fitting))
    lines = [f"init      {len(fitting)} of {len(own)} tensors ({taken / numbers:.1%} of the numbers) from {path}"]
    reasons = [f"{name}: {_why(own[name], theirs.get(name), num_classes)}" for name in own if name not in fitting]
    reasons += [f"{name}: not in this network" for name in theirs if name not in own and name not in PIXELS]
    lines += [f"          {reason}" for reason in reasons[:NAMED]]
    return lines + ([f"          and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else [])


def _why(own: torch.Tensor, theirs: torch.Tensor | None, num_classes: int) -> str:
    if theirs is None:
        return "not there: fresh"
    if own.dim() and own.shape[0] == num_classes and own.shape[1:] == theirs.shape[1:]:
        return f"{theirs.shape[0]} classes there, {num_classes} here: fresh"
    return f"{tuple(theirs.shape)} there, {tuple(own.shape)} here: fresh"
