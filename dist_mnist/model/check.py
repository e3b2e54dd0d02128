"""Checks of a network with a few images, before a run begins.

A network that cannot be trained is an error. Whatever would make results depend on the number of processes, or on where
a run is interrupted, is reported.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_mnist.config.settings import Config
from dist_mnist.model.classifier import Classifier, copy_network, unchanged_buffers
from dist_mnist.model.layers.batch_norm import GlobalBatchNorm, synchronise_batch_norm
from dist_mnist.model.layers.dropout import KEYED
from dist_mnist.model.losses import per_sample_loss
from dist_mnist.model.source import ModelSource, users_code
from dist_mnist.utils.errors import UserError, short

IMAGES = 4  # number of images for the check
TOLERANCE = 1e-3  # relative to the largest number; another order of summation makes a difference of about 1e-6
STORABLE = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
            torch.bool}  # fmt: skip
Report = Callable[[str], None]
# For each module, in order of completion: name, first input, output.
Outputs = list[tuple[str, torch.Tensor, torch.Tensor]]


def check_model(make: Callable[[], Classifier], images: torch.Tensor, num_classes: int, config: Config) -> list[str]:
    """Check a network that `make` builds for this purpose only.

    Args:
        images: at least two raw images (B, C, H, W), not normalised.

    Returns:
        Descriptions of what is not exact.

    Raises:
        UserError: the network cannot be trained.
    """
    source = ModelSource.parse(config.model)
    what = f"--model {source}"
    threads = threading.active_count()
    model = make()
    synchronise_batch_norm(model, over_ranks=False)
    hint = source.size_hint(model.inner, config.model_args, *images.shape[2:])
    trial = _Trial(model, what, source.origin, images, num_classes, hint)
    _check_layers(model, what)
    _check_parameters(model, what)
    with unchanged_buffers(model):
        logits = trial.logits()
        _check_numbers(logits.detach(), what)
        _check_gradients(model, logits, what)
    _check_copies(model, what)
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        config.check_parts("a network without")
    if config.crop:
        edge = slice(config.crop, -config.crop)
        named = f"with --crop {config.crop} {what}"
        _Trial(model, named, source.origin, images[:, :, edge, edge], num_classes).logits()
    found: list[str] = []
    _find_randomness(trial, found.append)
    _find_state(trial, found.append, one_pass=not config.invariant and config.accumulate == 1)
    started = threading.active_count() - threads
    if not found:
        _find_other_builds(trial, make(), found.append)
        _find_mixing(trial, found.append)
    if started > 0:
        found.append(f"it starts {started} {'thread' if started == 1 else 'threads'}")
    return found


class _Trial:
    """A network and the images to check it with; each sample has a key for dropout."""

    def __init__(
        self, model: Classifier, what: str, origin: str, images: torch.Tensor, num_classes: int, hint: str = ""
    ):
        self.model, self.what, self.origin, self.images, self.hint = model, what, origin, images, hint
        self.num_classes, self.keys = num_classes, torch.arange(len(images))

    def logits(
        self, samples: slice = slice(None), model: Classifier | None = None, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return checked logits of this network or `model`, for `images` or the usual ones, limited to `samples`."""
        images = (self.images if images is None else images)[samples]
        with users_code(self.what, self.origin, self.hint):
            logits = (model or self.model)(images, self.keys[samples])
        shape = len(images), self.num_classes
        expected = f"expected logits, a tensor {shape} of float32 for {shape[0]} images"
        if not isinstance(logits, torch.Tensor):
            raise UserError(f"{self.what} returns a {type(logits).__name__}; {expected}")
        if tuple(logits.shape) != shape or not logits.is_floating_point():
            raise UserError(f"{self.what} returns a tensor {tuple(logits.shape)} of {_dtype(logits)}; {expected}")
        return logits


def _check_layers(model: Classifier, what: str) -> None:
    for name, layer in model.inner.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise UserError(
                f"{what}: {name or 'it'} is compiled by torch.jit, and its dropout and batch normalisation layers "
                "cannot be replaced: give the module from before compilation"
            )
    registered = {id(parameter) for parameter in model.parameters()}
    for name, layer in model.inner.named_modules():
        for attribute, value in vars(layer).items():
            for hidden in _modules_in(value) if attribute not in INSIDES else ():
                if any(one.requires_grad and id(one) not in registered for one in hidden.parameters()):
                    raise UserError(
                        f"{what}: {f'{name}.{attribute}'.lstrip('.')} holds layers that are not registered with torch, "
                        "and so are neither trained nor saved: make it an nn.ModuleList or nn.ModuleDict"
                    )


def _modules_in(value: object) -> list[nn.Module]:
    """Return the modules in a plain container."""
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [one for one in found if isinstance(one, nn.Module)]


def _check_parameters(model: Classifier, what: str) -> None:
    named = dict(model.inner.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise UserError(f"{what} has no parameters to train{', as all are frozen' if named else ''}")
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{what}: its parameter {name} is {_dtype(parameter)}; parameters must be float32, whatever the "
                "--precision, and complex ones pairs of float32 (torch.view_as_complex)"
            )
        if parameter._post_accumulate_grad_hooks:
            raise UserError(
                f"{what}: its parameter {name} has a post-accumulate-grad hook, as for an optimizer in the backward "
                "pass; --optimizer updates the parameters: remove the hook"
            )
    _check_state(model, what)


def _check_state(model: Classifier, what: str) -> None:
    """Check that a checkpoint can hold the network's whole state_dict."""
    with users_code(f"the state_dict of {what}"):
        state = model.state_dict()
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in state.items():
        name = key.removeprefix("module.")
        if key not in own or not isinstance(tensor, torch.Tensor) or tensor.data_ptr() != own[key].data_ptr():
            raise UserError(
                f"{what}: its state_dict has {name}, which is not a parameter or buffer (get_extra_state or a hook may "
                "add such entries); checkpoints hold parameters and buffers only: make it a buffer"
            )
        if tensor.dtype not in STORABLE:
            raise UserError(f"{what}: its buffer {name} is {_dtype(tensor)}, which a checkpoint cannot hold")
        if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise UserError(f"{what}: elements of {name} share memory, as after expand: .clone() it")
    if missing := [name for name, _ in model.named_parameters() if name not in state]:
        raise UserError(
            f"{what}: its state_dict lacks the parameter {missing[0].removeprefix('module.')}, which a checkpoint "
            "must have: remove the hook that drops it"
        )


def _check_copies(model: Classifier, what: str) -> None:
    try:
        copy_network(model)
    except Exception as error:
        raise UserError(
            f"{what} cannot be copied (copy.deepcopy) after a forward pass, which evaluation needs for its threads "
            f"({error}): keep a tensor of the forward pass as .detach(), and no thread or file"
        ) from None


def _check_numbers(logits: torch.Tensor, what: str) -> None:
    if not logits.isfinite().all():
        raise UserError(
            f"{what} returns logits that are not finite for the first training images: check its initial weights"
        )
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise UserError(f"{what} returns probabilities; the loss needs logits: remove the softmax")


def _check_gradients(model: Classifier, logits: torch.Tensor, what: str) -> None:
    named = {name: parameter for name, parameter in model.inner.named_parameters() if parameter.requires_grad}
    unused = list(named)
    if logits.requires_grad:
        losses = per_sample_loss(logits, torch.zeros(len(logits), dtype=torch.int64))
        with users_code(f"the backward pass of {what}"), _recomputation_refused(model, what):
            gradients = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise UserError(f"{what}: the gradient of {name} is sparse; remove sparse=True")
        unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    if unused:
        first = ",".join(unused[:3])
        raise UserError(
            f"{what}: its logits for the first training images do not depend on {short(', '.join(unused), 200)}: "
            f"remove {_them(unused)} from the network, or from training: --freeze "
            f"{first if len(unused) <= 3 else 'PATTERN'}. A mixture of experts must compute every branch, even for "
            "zero images"
        )


@contextmanager
def _recomputation_refused(model: Classifier, what: str) -> Iterator[None]:
    """Refuse activation checkpointing around layers that need to know their samples, which a backward pass does not."""

    def refuse(layer: nn.Module, _: object) -> None:
        raise UserError(
            f"{what}: the backward pass recomputes {names[layer]} by activation checkpointing "
            "(torch.utils.checkpoint); exclude dropout and batch normalisation layers from it"
        )

    names = _names(model)
    layers = [layer for layer in names if isinstance(layer, GlobalBatchNorm | KEYED)]
    handles = [layer.register_forward_pre_hook(refuse) for layer in layers]
    with _removed_later(handles):
        yield


def _find_randomness(trial: _Trial, report: Report) -> None:
    """Report random numbers that are not keyed by sample; torch's dropout layers have been replaced by keyed ones."""
    others = _other_generators()
    drawing: list[str] = []
    with _watched(trial.model, torch.get_rng_state, lambda one, other: not one.equal(other), drawing):
        with unchanged_buffers(trial.model):
            once = trial.logits()
        with unchanged_buffers(trial.model):
            again = trial.logits()
    if drawing:
        report(
            f"{drawing[0]} draws from torch's random number generator (a layer such as nn.Dropout would be keyed by "
            "sample)"
        )
    elif others != _other_generators():
        report("it draws from Python's or numpy's random number generator")
    elif not once.equal(again):
        report("it returns different logits for the same images")


def _other_generators() -> object:
    """Return the states of Python's and numpy's generators, to be compared."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tobytes(), state["pos"]


def _find_state(trial: _Trial, report: Report, one_pass: bool) -> None:
    """Report state that a forward pass changes, and that another process or a restart would lack.

    A buffer that changes independently of the images, such as spectral normalisation's, is the same on all ranks if a
    step is `one_pass` on each.
    """
    attributes = _attributes(trial.model)
    before, after = {name for name, _ in trial.model.named_buffers()}, _moved_buffers(trial, trial.images)
    of_blanks = _moved_buffers(trial, torch.zeros_like(trial.images)) if after else {}
    saved = trial.model.state_dict().keys()
    for name, buffer in after.items():
        if not (one_pass and name in saved and name in before and _equal(buffer, of_blanks.get(name))):
            report(f"its forward pass changes the buffer {name.removeprefix('module.')}")
            return
    now = _attributes(trial.model)
    if changed := [name for name, value in now.items() if not _equal(attributes.get(name, value), value)]:
        report(f"its forward pass changes {changed[0]}, which no checkpoint holds")


def _moved_buffers(trial: _Trial, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the buffers that a forward pass changes, with their new values; the network's are restored."""
    model = trial.model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with unchanged_buffers(model):
        trial.logits(images=images)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: buffer for name, buffer in after.items() if not _equal(buffer, before.get(name))}


def _find_other_builds(trial: _Trial, other: Classifier, report: Report) -> None:
    """Report what differs in a second build of the network, and so may differ in other processes or after a restart."""
    model, others = trial.model, _tensors(other)
    if changed := [name for name, tensor in _tensors(model).items() if not _equal(tensor, others.get(name))]:
        report(f"its {changed[0].removeprefix('module.')} differs each time that it is built")
        return
    with torch.no_grad():
        once, again = trial.logits(model=model.eval()), trial.logits(model=other.eval())
    model.train()
    if not once.equal(again):
        report("it returns different logits each time that it is built")


def _tensors(model: Classifier) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _find_mixing(trial: _Trial, report: Report) -> None:
    """Report layers, other than batch normalisation, that make a sample's logits depend on the rest of its batch."""
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
                    together = trial.logits()
                with _recorded(trial.model, pieces):
                    apart = torch.cat([trial.logits(part) for part in parts])
        except UserError as error:
            report(f"it fails on a batch of one sample ({error})")
            break
        if _apart(together, apart):
            report(f"{_first_apart(whole, pieces)} mixes the samples of a batch in {mode} mode")
            break
    trial.model.train()


def _first_apart(whole: Outputs, pieces: Outputs) -> str:
    """Return the first module whose output, but not input, differs between a whole batch and its two parts."""
    count = len(whole)
    if len(pieces) == 2 * count:
        for (name, *together), (_, *one), (_, *other) in zip(whole, pieces[:count], pieces[count:], strict=True):
            saw, gave = (_parts_differ(*tensors) for tensors in zip(together, one, other, strict=True))
            if gave and not saw:
                return name
    return "it"


def _parts_differ(together: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
    return len(one) + len(other) == len(together) and _apart(together, torch.cat([one, other]))


def _apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not (one - other).abs().max() <= TOLERANCE * one.abs().max()


@contextmanager
def _watched(
    model: Classifier, state: Callable[[], torch.Tensor], differ: Callable[..., bool], found: list[str]
) -> Iterator[None]:
    """Record the first innermost module whose forward pass changes a state, for a `with` block."""
    before: list[torch.Tensor] = []

    def begins(*_: object) -> None:
        before.append(state())

    def ends(module: nn.Module, *_: object) -> None:
        if differ(before.pop(), state()) and not found:
            found.append(names[module])

    names, handles = _names(model), []
    for module in names:
        handles += [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]
    with _removed_later(handles):
        yield


@contextmanager
def _recorded(model: Classifier, outputs: Outputs) -> Iterator[None]:
    """Record the first input and the output of each module, with its name, for a `with` block."""
    names = _names(model)

    def ends(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        first = inputs[0] if inputs else None
        if all(isinstance(one, torch.Tensor) and one.dim() and one.is_floating_point() for one in (first, output)):
            outputs.append((names[module], first, output))  # type: ignore[arg-type]

    handles = [module.register_forward_hook(ends) for module in names]
    with _removed_later(handles):
        yield


@contextmanager
def _removed_later(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks after a `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _names(model: Classifier) -> dict[nn.Module, str]:
    """Return the modules of a network with names for messages."""
    return {
        module: f"{type(module).__name__} ({name})" if name else type(module).__name__
        for name, module in model.inner.named_modules()
    }


def _attributes(model: Classifier) -> dict[str, object]:
    """Return snapshots, by name, of what modules hold besides parameters, buffers and modules."""
    return {
        f"{name}.{attribute}".lstrip("."): _snapshot(value)
        for name, module in model.inner.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in INSIDES
    }


def _snapshot(value: object, depth: int = 0) -> object:
    """Return a comparable copy of a value; for an object that is no plain value, its identity."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.is_leaf else type(value)  # not a leaf: each forward pass makes a new one
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if depth < 4 and isinstance(value, dict):
        return [(_snapshot(key, depth + 1), _snapshot(one, depth + 1)) for key, one in value.items()]
    if depth < 4 and isinstance(value, list | tuple | deque):
        return [_snapshot(one, depth + 1) for one in value]
    if isinstance(value, dict | list | set | frozenset | deque):
        return id(value), len(value)
    return id(value)


def _equal(one: object, other: object) -> bool:
    """Whether two snapshots are equal; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other or (one != one and other != other)


INSIDES = frozenset(vars(nn.Module()))


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
