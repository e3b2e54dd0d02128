"""The folder of a run's data: what is named, what is found, and no dataset in place of another."""

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.sources import resolve as sources
from dist_mnist.data.sources.catalog import CATALOG
from dist_mnist.utils.errors import UserError

IMAGES, LABELS = np.zeros((6, 4, 4), np.uint8), np.arange(6, dtype=np.uint8) % 3


@pytest.fixture
def fashion(write_set, tmp_path, monkeypatch) -> Path:
    """A folder `root` whose files pass for Fashion-MNIST; no mirror answers."""
    folder = write_set(IMAGES, LABELS, folder=tmp_path / "root")
    digest = hashlib.sha256((folder / "t10k-labels-idx1-ubyte").read_bytes()).hexdigest()
    for name, known in CATALOG.items():
        own = digest if name == "fashion-mnist" else known.test_labels_sha256
        monkeypatch.setitem(CATALOG, name, replace(known, test_labels_sha256=own, mirrors=("http://127.0.0.1:1/",)))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_data_folder_no_dataset_asked_for_takes_what_is_there(fashion, monkeypatch, packed):
    if packed:
        labels = fashion / "t10k-labels-idx1-ubyte"
        Path(f"{labels}.gz").write_bytes(gzip.compress(labels.read_bytes()))
        labels.unlink()
    monkeypatch.setenv("DIST_MNIST_DATA", str(fashion))
    assert sources.identify(fashion) == "fashion-mnist"
    assert sources.data_folder(None) == sources.data_folder("fashion-mnist") == fashion


@pytest.mark.parametrize("dataset", ["mnist", "kmnist"])
def test_data_folder_another_dataset_there_is_not_taken(fashion, monkeypatch, dataset):
    monkeypatch.setenv("DIST_MNIST_DATA", str(fashion))
    with pytest.raises(UserError, match=f"{dataset}: .* could not be downloaded"):
        sources.data_folder(dataset)


def test_data_folder_misnamed_folder_is_refused(fashion, write_set, monkeypatch):
    write_set(IMAGES, LABELS, folder=fashion / "mnist")
    monkeypatch.setenv("DIST_MNIST_DATA", str(fashion))
    for ask in (lambda: sources.data_folder("mnist"), lambda: sources.get("mnist", fashion / "mnist")):
        with pytest.raises(UserError, match="root/mnist has fashion-mnist, not mnist"):
            ask()
    assert sources.data_folder("fashion-mnist", fashion / "mnist") == fashion / "mnist", "what is named is taken"


def test_data_folder_subfolder_of_its_name_is_preferred(fashion, write_set, monkeypatch):
    own = write_set(IMAGES, LABELS[::-1].copy(), folder=fashion / "kmnist")
    monkeypatch.setenv("DIST_MNIST_DATA", str(fashion))
    assert sources.data_folder("kmnist") == own
