"""The data sets that are known by name."""

from dist_mnist.data.sources.known.extended import EMNIST, KUZUSHIJI_49, QMNIST
from dist_mnist.data.sources.known.medmnist import MEDMNIST
from dist_mnist.data.sources.known.mnist import FASHION_MNIST, KMNIST, MNIST
from dist_mnist.data.sources.known.records import KnownDataset
from dist_mnist.utils.errors import UserError, unknown

CATALOG: dict[str, KnownDataset] = {
    dataset.name: dataset for dataset in (MNIST, FASHION_MNIST, KMNIST, *EMNIST, QMNIST, KUZUSHIJI_49, *MEDMNIST)
}

REFUSED = {"chestmnist": "an image of it has any number of 14 labels, and this program trains on one label an image"}


def known(name: str) -> KnownDataset:
    """The data set called `name`.

    Raises:
        UserError: there is none; the message lists the names and suggests the closest.
    """
    if name in REFUSED:
        raise UserError(f"{name} is left out: {REFUSED[name]}")
    if name not in CATALOG:
        raise UserError(unknown("dataset", name, CATALOG))
    return CATALOG[name]
