"""The table of known datasets: complete, well formed, and read without any heavy import."""

import subprocess
import sys

import pytest

from dist_mnist.data.sources.catalog import CATALOG, known
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S

NAMES = {
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
}


def test_known_each_name_gives_its_dataset():
    assert list(CATALOG) == ["mnist", "fashion-mnist", "kmnist"]
    assert all(known(name).name == name for name in CATALOG)


@pytest.mark.parametrize("dataset", CATALOG.values(), ids=CATALOG)
def test_catalog_each_entry_is_complete(dataset):
    assert {file.name for file in dataset.files} == NAMES and len(dataset.files) == 4
    assert all(len(bytes.fromhex(file.sha256)) == 32 and file.num_bytes > 4_000 for file in dataset.files)
    assert len(set(dataset.class_names)) == dataset.num_classes == 10
    assert len(set(dataset.mirrors)) >= 3
    assert all(mirror.startswith(("https://", "http://")) and mirror.endswith("/") for mirror in dataset.mirrors)


def test_catalog_all_checksums_differ():
    digests = [file.sha256 for dataset in CATALOG.values() for file in dataset.files]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("typed", "meant"), [("minst", "mnist"), ("Fashion_MNIST", "fashion-mnist"), ("KMNIST", "kmnist")]
)
def test_known_misspelt_name_suggests_the_nearest(typed, meant):
    with pytest.raises(UserError, match=f"'{typed}', did you mean '{meant}'. .there are: mnist, fashion-mnist, kmnist"):
        known(typed)


def test_known_strange_name_lists_all_names():
    with pytest.raises(UserError, match=r"^unknown dataset 'imagenet-21k' .there are: mnist, fashion-mnist, kmnist.$"):
        known("imagenet-21k")


def test_catalog_and_download_import_loads_nothing_heavy():
    code = (
        "import sys, dist_mnist.data.sources.catalog, dist_mnist.data.sources.download\n"
        "print(*({'torch', 'numpy', 'requests', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS_AFTER_S, check=True
    )
    assert result.stdout.split() == []
