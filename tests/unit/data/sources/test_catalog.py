"""The table of known datasets: complete, well formed, and read without any heavy import."""

import subprocess
import sys

import pytest

from dist_mnist.config.choices import DataSet
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
    assert list(CATALOG)[:3] == ["mnist", "fashion-mnist", "kmnist"] and len(CATALOG) == 22
    assert all(known(name).name == name for name in CATALOG)


def test_known_names_are_those_of_the_setting():
    assert [dataset.value for dataset in DataSet] == [*CATALOG, "synthetic"]


@pytest.mark.parametrize("dataset", CATALOG.values(), ids=CATALOG)
def test_catalog_each_entry_is_complete(dataset):
    for file in dataset.files:
        algorithm, digest = file.checksum.split(":")
        assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16}[algorithm]
        assert file.num_bytes is None or file.num_bytes > 4_000
    assert len(set(dataset.class_names)) == dataset.num_classes >= 2
    assert all(name.isprintable() and name.strip() for name in dataset.class_names)
    assert all(mirror.startswith(("https://", "http://")) and mirror.endswith("/") for mirror in dataset.mirrors)
    if dataset.conversion is None:
        assert {file.name for file in dataset.files} == NAMES and len(dataset.files) == 4
        assert len(set(dataset.mirrors)) >= 3
    else:
        parts = [part for parts in dataset.conversion.splits.values() for part in parts]
        used = {location.file for part in parts for location in (part.images, part.labels)}
        assert used == {file.name for file in dataset.files}, "none is downloaded for nothing"
        assert list(dataset.conversion.splits)[-1] == "t10k", "its labels mark a folder as complete"


@pytest.mark.parametrize(
    ("name", "num_classes", "some"),
    [
        ("emnist-byclass", 62, {9: "9", 10: "A", 36: "a", 61: "z"}),
        ("emnist-bymerge", 47, {35: "Z", 36: "a", 46: "t"}),
        ("emnist-balanced", 47, {38: "d", 43: "n"}),
        ("emnist-letters", 26, {0: "A", 25: "Z"}),
        ("emnist-digits", 10, {0: "0"}),
        ("kuzushiji-49", 49, {0: "あ", 44: "ゐ", 48: "ゝ"}),
        ("organcmnist", 11, {4: "kidney-left"}),
    ],
)
def test_catalog_classes_are_the_published_ones(name, num_classes, some):
    dataset = known(name)
    assert dataset.num_classes == num_classes
    assert {label: dataset.class_names[label] for label in some} == some


def test_catalog_all_checksums_differ():
    files = {file for dataset in CATALOG.values() for file in dataset.files}  # EMNIST's splits have the same one
    assert len({file.checksum for file in files}) == len(files) == 12 + 1 + 4 + 4 + 11


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("minst", "mnist"), ("Fashion_MNIST", "fashion-mnist"), ("KMNIST", "kmnist"), ("emnist_letter", "emnist-letters")],
)
def test_known_misspelt_name_suggests_the_nearest(typed, meant):
    with pytest.raises(
        UserError, match=f"'{typed}', did you mean '{meant}'. .there are: mnist, fashion-mnist, kmnist, "
    ):
        known(typed)


def test_known_strange_name_lists_all_names():
    with pytest.raises(UserError, match=r"^unknown dataset 'imagenet-21k' .there are: mnist, .*, organsmnist.$"):
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
