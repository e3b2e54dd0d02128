"""Finding the four files under all their names, and unpacking them once, wherever that is allowed."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.idx import open_idx, unpack, write_idx
from dist_mnist.data.sources.files import find_files, has_files
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S

KINDS = [("train", "images"), ("train", "labels"), ("test", "images"), ("test", "labels")]
ARRAYS = {
    kind: np.arange(40, dtype=np.uint8).reshape(5, 2, 4) + i if kind[1] == "images" else np.arange(5, dtype="u1") + i
    for i, kind in enumerate(KINDS)
}


def name_of(split: str, what: str, test: str = "t10k", dash: str = "-", prefix: str = "") -> str:
    return f"{prefix}{test if split == 'test' else split}-{what}{dash}idx{ARRAYS[split, what].ndim}-ubyte"


def write_files(folder: Path, packed: bool = False, **naming: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for (split, what), array in ARRAYS.items():
        path = folder / name_of(split, what, **naming)
        write_idx(path, array)
        if packed:
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    return folder


def check_content(folder: Path) -> list[Path]:
    """Check what is found in `folder` against ARRAYS; gives the paths."""
    files = find_files(folder)
    paths = [getattr(files[split], what) for split, what in KINDS]
    for path, array in zip(paths, ARRAYS.values(), strict=True):
        np.testing.assert_array_equal(open_idx(path), array)
    return paths


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIST_MNIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read_only(tmp_path):
    """A folder of gzip files that nobody may write."""
    folder = write_files(tmp_path / "set", packed=True)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzip"])
@pytest.mark.parametrize(
    "naming",
    [{}, {"dash": "."}, {"test": "test"}, {"test": "test", "dash": "."}, {"prefix": "emnist-digits-"}],
    ids=str,
)
def test_find_files_every_naming_is_found(tmp_path, naming, packed):
    write_files(tmp_path, packed, **naming)
    assert has_files(tmp_path)
    assert [path.name for path in check_content(tmp_path)] == [name_of(*kind, **naming) for kind in KINDS]


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzip"])
@pytest.mark.parametrize("sub", ["raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw"])
def test_find_files_known_subfolder_is_searched(tmp_path, sub, packed):
    write_files(tmp_path / sub, packed)
    assert has_files(tmp_path)
    assert {path.parent for path in check_content(tmp_path)} == {tmp_path / sub}


def test_find_files_raw_beside_packed_takes_raw(tmp_path):
    write_files(tmp_path)
    for path in list(tmp_path.iterdir()):
        Path(f"{path}.gz").write_bytes(b"no gzip at all")
    check_content(tmp_path)


def test_find_files_folder_named_like_a_file_is_skipped(tmp_path):
    """A widespread archive of MNIST holds `t10k-images.idx3-ubyte` beside a folder `t10k-images-idx3-ubyte/`."""
    write_files(tmp_path, dash=".")
    for kind in KINDS:
        (tmp_path / name_of(*kind)).mkdir()
    check_content(tmp_path)


def test_find_files_second_call_does_not_unpack_again(tmp_path):
    before = [path.stat() for path in check_content(write_files(tmp_path, packed=True))]
    after = [path.stat() for path in check_content(tmp_path)]
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [(s.st_ino, s.st_mtime_ns) for s in after]


def test_find_files_read_only_folder_unpacks_into_the_cache(read_only, cache):
    before = sorted(os.listdir(read_only))
    assert {path.parent for path in check_content(read_only)} == {cache}
    assert sorted(os.listdir(read_only)) == before


def test_find_files_cache_keeps_folders_and_old_files_apart(read_only, cache, tmp_path):
    old = find_files(read_only)["train"].labels
    other = write_files(tmp_path / "other", packed=True)
    (other / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(old.read_bytes()[:-1] + b"\x63"))
    other.chmod(0o555)
    assert open_idx(find_files(other)["train"].labels)[-1] == 0x63
    (read_only / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(old.read_bytes()[:-1] + b"\x64"))
    assert open_idx(find_files(read_only)["train"].labels)[-1] == 0x64


def test_find_files_unwritable_cache_says_what_to_set(read_only, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_MNIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be unpacked to .*set DIST_MNIST_CACHE"):
        find_files(read_only)


PROCESS = """
import hashlib, pathlib, sys, time
from dist_mnist.data.sources.files import find_files
folder, start = map(pathlib.Path, sys.argv[1:])
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
path = find_files(folder)["train"].images
print(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_ino, path.stat().st_mtime_ns)
"""


@pytest.mark.parametrize("where", ["beside", "cache"])
def test_find_files_four_processes_unpack_once(tmp_path, cache, where):
    folder, start = write_files(tmp_path / "set", packed=True), tmp_path / "start"
    write_idx(tmp_path / "large", np.arange(8 << 20, dtype=np.uint8).reshape(-1, 32, 32))
    packed = gzip.compress((tmp_path / "large").read_bytes(), 1)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(packed)
    folder.chmod(0o755 if where == "beside" else 0o555)
    command = [sys.executable, "-c", PROCESS, str(folder), str(start)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    start.touch()
    found = {process.communicate(timeout=HANGS_AFTER_S)[0] for process in processes}
    folder.chmod(0o755)
    assert [process.returncode for process in processes] == [0] * 4
    assert len(found) == 1, "all read one file, which was unpacked once"
    np.testing.assert_array_equal(open_idx(find_files(folder)["train"].images), open_idx(tmp_path / "large"))
    assert not list(tmp_path.rglob(".*")), "neither unfinished files nor locks"


def test_find_files_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path / 'absent'}: the folder of idx files does not exist"):
        find_files(tmp_path / "absent")


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_find_files_missing_file_is_named(tmp_path, kind):
    (write_files(tmp_path) / name_of(*kind)).unlink()
    assert not has_files(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: no file found for {' '.join(kind)};"):
        find_files(tmp_path)


def test_find_files_broken_link_is_named(tmp_path):
    write_files(tmp_path)
    [path] = tmp_path.glob("train-labels*")
    path.unlink()
    path.symlink_to("/elsewhere/labels")
    with pytest.raises(
        UserError, match=f"no file found for train labels.*{path.name} is a link to /elsewhere/labels, "
    ):
        find_files(tmp_path)


def test_find_files_link_out_of_the_folder_is_followed(tmp_path):
    """People keep data elsewhere; what a link leads to is checked as any file is."""
    write_files(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    check_content(tmp_path / "data")


@pytest.mark.parametrize("naming", [{"test": "test"}, {"prefix": "emnist-digits-"}], ids=str)
def test_find_files_two_datasets_in_one_folder_are_refused(tmp_path, naming):
    write_files(write_files(tmp_path), **naming)
    with pytest.raises(UserError, match=r"both .* and .* could be the .*; keep one dataset per folder"):
        find_files(tmp_path)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def pack(path: Path, to: Path | None = None) -> Path:
    """A gzip form of `path`, in its place where there is no other name."""
    content = gzip.compress(path.read_bytes())
    (to or path).write_bytes(content)
    return to or path


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzip"])
def test_find_files_name_says_nothing_of_the_content(tmp_path, cache, packed):
    """Gzip files without the suffix, and raw ones with it."""
    for path in list(write_files(tmp_path / "set").iterdir()):
        if packed:
            pack(path)
        else:
            path.rename(f"{path}.gz")
    before = snapshot(tmp_path / "set")
    assert has_files(tmp_path / "set")
    paths = check_content(tmp_path / "set")
    assert {path.parent for path in paths} == {cache if packed else tmp_path / "set"}
    assert snapshot(tmp_path / "set") == before


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzip"])
def test_find_files_upper_case_names_are_found(tmp_path, packed):
    for path in list(write_files(tmp_path, packed).iterdir()):
        path.rename(path.with_name(path.name.upper()))
    assert has_files(tmp_path)
    check_content(tmp_path)


def test_find_files_leaves_of_macos_are_ignored(tmp_path):
    for path in list(write_files(tmp_path, prefix="emnist-letters-").iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    check_content(tmp_path)


def test_find_files_val_is_the_test_split_where_there_is_no_other(tmp_path):
    write_files(tmp_path, test="val")
    check_content(tmp_path)
    assert has_files(tmp_path)
    assert find_files(tmp_path)["test"].notes == (
        "val-images-idx3-ubyte, val-labels-idx1-ubyte: read as the test files, because there are no others",
    )
    write_files(tmp_path)
    files = find_files(tmp_path)["test"]
    assert files.images.name == "t10k-images-idx3-ubyte" and "not read" in files.notes[0]


@pytest.mark.parametrize("damage", ["truncated", "too long", "is stale", "is not an idx file"])
def test_find_files_whole_archive_beside_a_bad_raw_file_wins(tmp_path, cache, damage):
    folder = write_files(tmp_path / "set")
    raw = folder / name_of("train", "images")
    packed = pack(raw, Path(f"{raw}.gz"))
    whole = raw.read_bytes()
    if damage == "is stale":
        write_idx(raw, np.zeros((4, 2, 4), np.uint8))
    else:
        raw.write_bytes({"truncated": whole[:-3], "too long": whole + b"x", "is not an idx file": b""}[damage])
    before = snapshot(folder)
    for _ in range(2):
        assert check_content(folder)[0].parent == cache
        [note] = find_files(folder)["train"].notes
        assert note.startswith(f"{raw} ") and damage in note and f"reading the intact {packed.name}" in note
    assert snapshot(folder) == before, "neither is touched"


def test_find_files_bad_raw_file_beside_a_bad_archive_is_named(tmp_path):
    folder = write_files(tmp_path)
    raw = folder / name_of("train", "images")
    pack(raw, packed := Path(f"{raw}.gz"))
    packed.write_bytes(packed.read_bytes()[:-9])
    raw.write_bytes(raw.read_bytes()[:-3])
    files = find_files(folder)["train"]
    assert files.images == raw and not files.notes
    with pytest.raises(UserError, match=f"{raw} is truncated"):
        open_idx(files.images)


def test_find_files_good_raw_file_beside_an_archive_is_used_and_nothing_unpacked(tmp_path, cache):
    folder = write_files(tmp_path / "set")
    for path in list(folder.iterdir()):
        pack(path, Path(f"{path}.gz"))
    before = snapshot(folder)
    assert {path.parent for path in check_content(folder)} == {folder}
    assert snapshot(folder) == before and not cache.exists()


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzip"])
def test_find_files_reading_leaves_nothing_hidden(tmp_path, packed):
    before = set(os.listdir(write_files(tmp_path, packed)))
    check_content(tmp_path)
    assert set(os.listdir(tmp_path)) - before == ({name_of(*kind) for kind in KINDS} if packed else set())


def test_find_files_only_a_training_part_is_enough_where_that_is_asked_for(tmp_path):
    write_files(tmp_path)
    (tmp_path / name_of("test", "images")).unlink()
    with pytest.raises(UserError, match="no file found for test images;"):
        find_files(tmp_path, need_test=False)
    (tmp_path / name_of("test", "labels")).unlink()
    assert not has_files(tmp_path) and has_files(tmp_path, need_test=False)
    assert list(find_files(tmp_path, need_test=False)) == ["train"]
    with pytest.raises(UserError, match=r"no file found for test images, test labels.*--test-fraction 0.1"):
        find_files(tmp_path)


def test_unpack_to_a_name_that_another_node_took_meanwhile_leaves_its_file(tmp_path):
    """Locks are of one node: on shared storage another may unpack too, and its ranks have mapped the file."""
    folder = write_files(tmp_path, packed=True)
    packed, target = folder / f"{name_of('train', 'labels')}.gz", folder / name_of("train", "labels")
    target.write_bytes(b"theirs")
    mapped = target.stat().st_ino
    unpack(packed, target)
    assert target.read_bytes() == b"theirs" and target.stat().st_ino == mapped
    assert not list(folder.glob(".*"))


def test_unpack_on_a_file_system_without_hard_links_takes_the_name_all_the_same(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    check_content(write_files(tmp_path, packed=True))
    assert not list(tmp_path.glob(".*"))
