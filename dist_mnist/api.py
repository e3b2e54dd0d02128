"""Training from Python: `from dist_mnist import train`."""

import inspect
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dist_mnist.config.overrides import Overrides
from dist_mnist.config.settings import OF_CNN
from dist_mnist.distributed.world import World
from dist_mnist.elastic.preemption import SIGNALS, StopSignal
from dist_mnist.model.source import check_not_importing
from dist_mnist.reporting.listener import Listener
from dist_mnist.run.records import RunSummary, read_run
from dist_mnist.utils.errors import UserError


def train(model: nn.Module | str = "cnn", *, listeners: Sequence[Listener] = (), **settings: Any) -> RunSummary | None:
    """Train a network on idx files and evaluate it, as `torchrun -m dist_mnist.train` does. Collective.

    Under torchrun each process is one rank of the run, and every rank makes this call; otherwise one process trains.
    SIGTERM, SIGINT and SIGUSR1 are stop requests meanwhile: training saves and ends, and the same call resumes it.

    Args:
        model: a module with float32 parameters that returns logits (B, num_classes) for normalised images (B, C, H, W)
            float32, or a value of the option `--model`. A module trains from its current weights, which must be the
            same on all ranks. Afterwards it is in eval mode on the device of training, with the weights of the best
            checkpoint on rank 0 and the last weights on other ranks.
        listeners: called on rank 0, in addition to those that `log_to` names.
        settings: options by name: `data_dir="data", epochs=3, run_dir="runs/mine", invariant=True`.

    Returns:
        The contents of the run directory on rank 0, including the test result; its `result` is None after a stop
        request. None on other ranks.

    Raises:
        UserError: a setting, the data or the network cannot be used; the message says why and what to do.

    Example:
        >>> from torch import nn
        >>> from dist_mnist import train
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> run = train(network, data_dir="data/mnist", epochs=1, run_dir="runs/a", device="cpu")
        ... # doctest: +ELLIPSIS
        data      data/mnist: 540 for training, 60 for validation, 200 for testing; 10 classes
        ...
        >>> run.result.images, 0 <= run.result.accuracy <= 1
        (200, True)
    """
    module = model.cpu() if isinstance(model, nn.Module) else None  # goes to this rank's device later
    if module is None and not isinstance(model, str):
        raise UserError(f"model is a {type(model).__name__}; give a torch.nn.Module, or a name as for --model")
    from dist_mnist.train import run

    check_not_importing()
    if module is not None and (without_effect := [name for name in ("model_args", *OF_CNN) if settings.get(name)]):
        raise UserError(f"{without_effect[0]} has no effect on a module: it is for networks built by their name")
    overrides = Overrides({"model": model if module is None else _name_of(module), **settings})
    with _stop_requests() as stop, _classes_kept(module):
        path = run(overrides, stop, module, listeners)
    return read_run(path) if World.from_environment().is_main else None


def _name_of(module: nn.Module) -> str:
    """Name the class of a module as `--model` does, for the run's record."""
    kind = type(module)
    try:
        file = Path(inspect.getfile(kind))
    except (OSError, TypeError):
        return f"__main__:{kind.__name__}"  # defined interactively
    if kind.__module__.partition(".")[0] == "torch":  # such as Sequential: the class does not tell how it was built
        return f"__main__:{kind.__name__}"
    if kind.__module__ not in ("__main__", "__mp_main__"):  # the latter in a child of multiprocessing
        return f"{kind.__module__}:{kind.__name__}"
    return f"{file if file.suffix == '.py' else '__main__'}:{kind.__name__}"


@contextmanager
def _classes_kept(module: nn.Module | None) -> Iterator[None]:
    """Restore the classes and the `requires_grad` of a module's layers after a `with` block."""
    layers = [(layer, type(layer), set(vars(layer))) for layer in module.modules()] if module else []
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()] if module else []
    try:
        yield
    finally:
        for layer, kind, attributes in layers:
            if type(layer) is not kind:
                layer.__class__ = kind
                for added in vars(layer).keys() - attributes:
                    delattr(layer, added)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _stop_requests() -> Iterator[StopSignal]:
    """Handle stop requests within a `with` block, if this is the main thread; then restore the signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield StopSignal()
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopSignal.listening()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
