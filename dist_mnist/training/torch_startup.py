"""torch's optimizers and DDP without torch.compile's machinery.

They import it, in every process and after every restart, only to keep themselves out of what it compiles; that takes
longer than `import torch`, and nothing is compiled here. Where torch's insides are not as expected, it is imported
after all: nothing but time depends on this.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

EXEMPTED = "__dynamo_disable"  # the mark that torch leaves on a function which it has exempted (torch._compile)


def exempt(kind: type) -> None:
    """Mark the methods that torch would exempt from compilation when they are first called as exempted."""
    for method in vars(kind).values():
        while method := getattr(method, "__wrapped__", None):
            if not hasattr(method, EXEMPTED):
                setattr(method, EXEMPTED, method)


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` without its wrappers: hooks, of which there are none, and breaks for the compiler."""
    inspect.unwrap(type(optimizer).step)(optimizer)


def distributed(model: torch.nn.Module, **options: Any) -> DistributedDataParallel:
    """DistributedDataParallel, which asks the compiler's settings whether it is to be compiled. Collective."""
    exempt(DistributedDataParallel)
    if "_dynamo" in vars(torch):
        return DistributedDataParallel(model, **options)
    settings = SimpleNamespace(get_optimize_ddp_mode=lambda: "no_optimization")
    torch._dynamo = SimpleNamespace(utils=settings)  # type: ignore[assignment]
    try:
        return DistributedDataParallel(model, **options)
    except AttributeError:
        del torch._dynamo
        return DistributedDataParallel(model, **options)
    finally:
        vars(torch).pop("_dynamo", None)
