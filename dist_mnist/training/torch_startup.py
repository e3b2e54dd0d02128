"""Optimizers and DDP of torch without importing torch.compile's machinery.

They import it in every process, and after every restart, only to exempt themselves from compilation. That takes longer
than `import torch`, and nothing is compiled here. If torch's internals are not as expected, it is imported after all:
only time depends on this.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

EXEMPTED = "__dynamo_disable"  # attribute that torch sets on a function it has exempted (torch._compile)


def exempt(kind: type) -> None:
    """Mark methods as exempt from compilation, which torch would do at their first call."""
    for method in vars(kind).values():
        while method := getattr(method, "__wrapped__", None):
            if not hasattr(method, EXEMPTED):
                setattr(method, EXEMPTED, method)


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Run `optimizer.step()` without its wrappers: hooks, which are not used here, and graph breaks."""
    inspect.unwrap(type(optimizer).step)(optimizer)


def distributed(model: torch.nn.Module, **options: Any) -> DistributedDataParallel:
    """Return the model in DistributedDataParallel, with a stub for the compiler settings that it reads. Collective."""
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
