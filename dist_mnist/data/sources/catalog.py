"""The datasets that are known by name."""

from dist_mnist.data.sources.known.extended import EMNIST, KUZUSHIJI_49, QMNIST
from dist_mnist.data.sources.known.medmnist import MEDMNIST
from dist_mnist.data.sources.known.mnist import FASHION_MNIST, KMNIST, MNIST
from dist_mnist.data.sources.known.records import KnownDataset
from dist_mnist.utils.errors import UserError, unknown

CATALOG: dict[str, KnownDataset] = {
    dataset.name: dataset for dataset in (MNIST, FASHION_MNIST, KMNIST, *EMNIST, QMNIST, KUZUSHIJI_49, *MEDMNIST)
}

REFUSED = {"chestmnist": "its images have any number of 14 labels, but training needs exactly one label per image"}


def known(name: str) -> KnownDataset:
    """Return the dataset called `name`.

    Raises:
        UserError: the name is unknown; the message lists all names and the closest match.
    """
    if name in REFUSED:
        raise UserError(f"{name} is not supported: {REFUSED[name]}")
    if name not in CATALOG:
        raise UserError(unknown("dataset", name, CATALOG))
    return CATALOG[name]
