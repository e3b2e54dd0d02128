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

    Started by torchrun, this process is one rank of the run, and every rank calls it; else it trains alone. SIGTERM,
    SIGINT and SIGUSR1 are stop requests meanwhile: training ends in order, and the same call resumes it.

    Args:
        model: a module of float32 parameters that gives logits (B, num_classes) of normalised images (B, C, H, W)
            float32, or what the option `--model` takes. A module trains from the weights that it has, which have to be
            the same on all ranks. It ends on the device on which it trained, in eval mode, on rank 0 with the weights
            of the best checkpoint, on others with the last.
        listeners: are told of the run, on rank 0, beside those that `log_to` names.
        settings: by the names of the options: `data_dir="data", epochs=3, run_dir="runs/mine", invariant=True`.

    Returns:
        On rank 0 what the run directory holds, with the test result; `result` is None if a stop request came first.
        On other ranks None.

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
        raise UserError(f"train takes a torch.nn.Module or a name as --model does, not a {type(model).__name__}")
    from dist_mnist.train import run

    check_not_importing()
    if module is not None and (without_effect := [name for name in ("model_args", *OF_CNN) if settings.get(name)]):
        raise UserError(f"{without_effect[0]} is for a network that train makes by its name; a module is made already")
    overrides = Overrides({"model": model if module is None else _name_of(module), **settings})
    with _stop_requests() as stop, _classes_kept(module):
        path = run(overrides, stop, module, listeners)
    return read_run(path) if World.from_environment().is_main else None


def _name_of(module: nn.Module) -> str:
    """Where the class of a module is, as `--model` has it, for the record."""
    kind = type(module)
    try:
        file = Path(inspect.getfile(kind))
    except (OSError, TypeError):
        return f"__main__:{kind.__name__}"  # typed in
    if kind.__module__.partition(".")[0] == "torch":  # which says nothing of how this one is made
        return f"__main__:{kind.__name__}"
    if kind.__module__ not in ("__main__", "__mp_main__"):  # the latter in a process of multiprocessing's
        return f"{kind.__module__}:{kind.__name__}"
    return f"{file if file.suffix == '.py' else '__main__'}:{kind.__name__}"


@contextmanager
def _classes_kept(module: nn.Module | None) -> Iterator[None]:
    """Give a module's layers their classes back, and what is frozen its gradient, after a `with` block."""
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
    """Listen for stop requests within a `with` block, where Python lets this thread; then all is as before."""
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
