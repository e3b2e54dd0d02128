"""Sets that are published in other forms than MNIST's: what `data get` makes of them, from a server of stand-ins.

What is published                                    What must be in the folder
EMNIST: one zip of all, transposed, `._` files       upright images of the split that is asked for, labels from 0
QMNIST: labels of eight columns, 60 000 to test      the class alone; MNIST's 10 000 as test set, the others beside
Kuzushiji-49: npz of `arr_0`                         the same as idx
MedMNIST: npz of three splits, labels in a column    the validation images at the end of the training images
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.idx import open_idx
from dist_mnist.data.sources.catalog import CATALOG, known
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.data.sources.known.convert import WORK
from dist_mnist.data.sources.resolve import data_folder, get
from dist_mnist.data.splits import open_data, open_test50k
from dist_mnist.utils.errors import UserError
from helpers.published import Mirror, Published, mirror_of

CONVERTED = [name for name, dataset in CATALOG.items() if dataset.conversion]
Serve = Callable[[str], tuple[Mirror, Published]]


@pytest.fixture
def serve(monkeypatch) -> Iterator[Serve]:
    """`serve(name)`: from now on a server has the stand-in of that set, and the catalogue knows it."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(mirror_of(name, monkeypatch))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".download.lock"}


def check_folder(folder: Path, name: str, stand_in: Published) -> None:
    """Check that `folder` holds exactly what a set's stand-in is to become."""
    kinds = {"classes.json", "dataset.json"}
    for prefix, (images, labels) in stand_in.splits.items():
        names = f"{prefix}-images-idx{images.ndim}-ubyte", f"{prefix}-labels-idx1-ubyte"
        np.testing.assert_array_equal(open_idx(folder / names[0]), images)
        np.testing.assert_array_equal(open_idx(folder / names[1]), labels)
        kinds |= {*names}
    assert content(folder).keys() == kinds, "no archive, nothing unfinished"
    assert read_class_names(folder) == CATALOG[name].class_names
    assert open_data(folder).num_classes == CATALOG[name].num_classes


@pytest.mark.parametrize("name", CONVERTED)
def test_get_makes_idx_files_and_class_names_of_what_is_published(serve, tmp_path, name):
    mirror, stand_in = serve(name)
    assert get(name, tmp_path / "set", verify=True) == tmp_path / "set"
    check_folder(tmp_path / "set", name, stand_in)
    assert mirror.requests == dict.fromkeys(stand_in.files, 1)
    before = content(tmp_path / "set")
    get(name, tmp_path / "set", verify=True)
    get(name, tmp_path / "set")
    assert content(tmp_path / "set") == before and mirror.requests.total() == len(stand_in.files), "nothing to do"


def test_get_qmnist_has_the_images_beyond_mnist_s_beside_its_test_set(serve, tmp_path):
    _, stand_in = serve("qmnist")
    data = open_data(get("qmnist", tmp_path))
    more = open_test50k(tmp_path, data)
    assert (len(data.test), len(more)) == (10_000, 50)
    np.testing.assert_array_equal(more.images[..., 0], stand_in.splits["test50k"][0])
    np.testing.assert_array_equal(more.labels, stand_in.splits["test50k"][1])


@pytest.mark.parametrize("name", ["pathmnist", "organsmnist"])
def test_get_medmnist_note_gives_the_fraction_that_is_its_validation_split(name):
    from dist_mnist.data.dataset import IdxDataset
    from dist_mnist.data.sources.known.medmnist import ENTRIES

    train, validation = ENTRIES[name].num_train, ENTRIES[name].num_validation
    fraction = float(CATALOG[name].note.split("--validation-fraction ")[1].split()[0])
    whole = IdxDataset(np.broadcast_to(np.uint8(0), (train + validation, 1, 1)), np.zeros(train + validation, np.uint8))
    assert [len(part) for part in whole.split(fraction, None)] == [train, validation]


def test_data_folder_finds_makes_and_recognises_a_converted_set(serve, tmp_path, monkeypatch):
    mirror, stand_in = serve("emnist-letters")
    monkeypatch.setenv("DIST_MNIST_DATA", str(tmp_path))
    assert data_folder("emnist-letters") == tmp_path / "emnist-letters"
    check_folder(tmp_path / "emnist-letters", "emnist-letters", stand_in)
    assert data_folder("emnist-letters") == tmp_path / "emnist-letters" and mirror.requests.total() == 1
    monkeypatch.setenv("DIST_MNIST_DATA", str(tmp_path / "emnist-letters"))
    assert data_folder("emnist-letters") == tmp_path / "emnist-letters", "by its manifest"
    with pytest.raises(UserError, match="has emnist-letters, not emnist-digits"):
        get("emnist-digits", tmp_path / "emnist-letters")


@pytest.mark.parametrize("place", [".", "emnist-digits"])
def test_get_archive_that_is_there_is_used_and_left(serve, tmp_path, place):
    mirror, stand_in = serve("emnist-digits")
    archive = tmp_path / place / "gzip.zip"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(stand_in.files["gzip.zip"])
    get("emnist-digits", tmp_path / "emnist-digits")
    assert not mirror.requests and archive.read_bytes() == stand_in.files["gzip.zip"]
    assert (tmp_path / "emnist-digits" / "t10k-labels-idx1-ubyte").is_file()


def test_get_published_files_that_are_idx_files_are_used_from_the_folder_above(serve, tmp_path):
    mirror, stand_in = serve("qmnist")
    folder = tmp_path / "qmnist"
    folder.mkdir()
    for name, body in stand_in.files.items():
        (folder / name).write_bytes(body)
    with pytest.raises(UserError, match=f"has the published files of qmnist, .*: move them to {tmp_path}, where"):
        get("qmnist", folder, verify=True)
    for name in stand_in.files:
        (folder / name).rename(tmp_path / name)
    get("qmnist", folder, verify=True)
    check_folder(folder, "qmnist", stand_in)
    assert not mirror.requests


def test_get_archive_that_is_there_but_not_the_published_one_is_left_alone(serve, tmp_path, capfd):
    mirror, stand_in = serve("bloodmnist")
    (tmp_path / "bloodmnist.npz").write_bytes(b"something else")
    get("bloodmnist", tmp_path / "bloodmnist")
    check_folder(tmp_path / "bloodmnist", "bloodmnist", stand_in)
    assert "bloodmnist.npz is not used: its MD5 differs from the published one" in capfd.readouterr().err
    assert (tmp_path / "bloodmnist.npz").read_bytes() == b"something else" and mirror.requests.total() == 1


def test_get_wrong_archive_on_the_mirror_nothing_is_made(serve, tmp_path):
    mirror, _ = serve("qmnist")
    mirror.files["qmnist-test-labels-idx2-int.gz"] = mirror.files["qmnist-train-labels-idx2-int.gz"]
    folder = tmp_path / "qmnist"
    why = rf"qmnist: qmnist-test-labels-idx2-int\.gz could not be .*Copy the published files into {tmp_path}, or"
    with pytest.raises(UserError, match=why):
        get("qmnist", folder)
    assert content_names(folder) == {WORK}
    assert content_names(folder / WORK) == {*mirror.files} - {"qmnist-test-labels-idx2-int.gz"}, "for the next time"


def test_get_that_no_mirror_answers_leaves_nothing_to_be_seen(serve, tmp_path):
    mirror, _ = serve("bloodmnist")
    mirror.files.clear()
    with pytest.raises(UserError, match=f"Copy the published files into {tmp_path}/set, or"):
        get("bloodmnist", tmp_path / "set")
    assert not content_names(tmp_path / "set")


def content_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".download.lock"}


def test_get_after_one_that_was_killed_begins_anew_with_the_archives_that_are_there(serve, tmp_path):
    mirror, stand_in = serve("kuzushiji-49")
    work = tmp_path / WORK
    work.mkdir()
    (work / "k49-train-imgs.npz").write_bytes(stand_in.files["k49-train-imgs.npz"])
    (work / "k49-test-imgs.npz").write_bytes(b"half")
    (work / "train-images-idx3-ubyte").write_bytes(b"half")
    (work / ".t10k-images-idx3-ubyte.1234abcd.tmp").write_bytes(b"half")
    get("kuzushiji-49", tmp_path)
    check_folder(tmp_path, "kuzushiji-49", stand_in)
    assert mirror.requests == dict.fromkeys(stand_in.files.keys() - {"k49-train-imgs.npz"}, 1)


@pytest.mark.parametrize("own", ["train-images-idx3-ubyte", "classes.json", "t10k-labels-idx1-ubyte.gz"])
def test_get_into_a_folder_of_other_files_is_refused_before_any_request(serve, tmp_path, own):
    mirror, _ = serve("octmnist")
    (tmp_path / own).write_bytes(b"my own")
    with pytest.raises(UserError, match=rf"has {own}, which .* does not replace: give another folder for octmnist"):
        get("octmnist", tmp_path, verify=True)
    assert (tmp_path / own).read_bytes() == b"my own" and not mirror.requests


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = {
    "truncated": (truncate, r"it has \d+ bytes, expected \d+"),
    "changed": (change_a_byte, "its content has changed since it was written"),
    "too long": (append, r"it has \d+ bytes, expected \d+"),
    "missing": (Path.unlink, "it is missing"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["train-images-idx4-ubyte", "t10k-labels-idx1-ubyte", "classes.json"])
def test_get_names_and_makes_again_what_is_not_whole(serve, tmp_path, capfd, file, damage, why):
    serve("pathmnist")
    get("pathmnist", tmp_path)
    before = content(tmp_path)
    damage(tmp_path / file)
    get("pathmnist", tmp_path, verify=True)
    said = capfd.readouterr().err
    assert content(tmp_path) == before
    [line] = [line for line in said.splitlines() if line.startswith("warning")]
    assert line.startswith(f"warning: {tmp_path / file}: ") and line.endswith("; converting it again")
    assert re.search(why, line)


def test_get_without_a_manifest_the_folder_is_taken_for_the_user_s_own(serve, tmp_path):
    serve("breastmnist")
    get("breastmnist", tmp_path)
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    assert manifest["dataset"] == "breastmnist" and len(manifest["files"]) == 5
    (tmp_path / "dataset.json").write_text('{"dataset": 3}')
    with pytest.raises(UserError, match=r"did not write and does not replace"):
        get("breastmnist", tmp_path, verify=True)


def test_known_multi_label_set_is_refused_with_the_reason():
    with pytest.raises(UserError, match="chestmnist is not supported: its images have any number of 14 labels"):
        known("chestmnist")
