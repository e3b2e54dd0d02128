"""An exact, fast and restartable data-parallel trainer for small images in the idx (MNIST) format.

`train` trains and tests a network, also one of your own. The other names are its parts, for training loops of your own:
dataset, global order of the samples, the sampler that shards it over ranks, loader, network and process group.
tests/examples has such loops in plain PyTorch, Accelerate and Lightning.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_mnist.api import train as train
    from dist_mnist.data.dataset import IdxDataset
    from dist_mnist.data.loader import Batch, Loader, collate
    from dist_mnist.data.sampler import GlobalOrder, ShardedBatchSampler
    from dist_mnist.data.splits import Data, open_data
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.process_group import process_group
    from dist_mnist.distributed.world import World
    from dist_mnist.model.families.cnn import CNN
    from dist_mnist.reporting.listener import Listener
    from dist_mnist.utils.versions import __version__ as __version__

__all__ = [
    "CNN", "Batch", "Data", "GlobalOrder", "IdxDataset", "Listener", "Loader", "ShardedBatchSampler", "World",
    "collate", "open_data", "process_group", "train", "use_device",
]  # fmt: skip

_MODULES = {
    "data.dataset": ("IdxDataset",),
    "data.loader": ("Batch", "Loader", "collate"),
    "data.sampler": ("GlobalOrder", "ShardedBatchSampler"),
    "data.splits": ("Data", "open_data"),
    "distributed.device": ("use_device",),
    "distributed.process_group": ("process_group",),
    "distributed.world": ("World",),
    "model.families.cnn": ("CNN",),
    "reporting.listener": ("Listener",),
    "utils.versions": ("__version__",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `dist-mnist --help` needs no torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"dist_mnist.{module}"), name)
    raise AttributeError(f"module 'dist_mnist' has no attribute {name!r}")


class _Package(ModuleType):
    """A module whose `train` stays the function, even after the module dist_mnist.train has been imported."""

    @property
    def train(self) -> Any:
        """`api.train`."""
        return import_module("dist_mnist.api").train

    @train.setter
    def train(self, module: ModuleType) -> None:
        """Ignore the assignment that the import of the module makes."""


sys.modules[__name__].__class__ = _Package
