"""`data get` into a folder that has files already: those that are not whole are named and replaced, others stay.

What is there                                        What must happen
raw or packed, truncated or too long                 named, downloaded again
raw damaged beside a whole archive                   named, unpacked again, no request
raw of the right length, of other content            the same
an archive that somebody else packed                 said, and left
damaged, in a folder of another data set             refused, and left
no mirror answers                                    an error, and the file stays
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_mnist.data.sources.download import LOCK_NAME
from dist_mnist.data.sources.resolve import get
from dist_mnist.utils.errors import UserError
from helpers.published import Mirror, Published, idx, mirror_of

IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture(params=["mnist", "kmnist"])
def served(request, monkeypatch) -> Iterator[tuple[str, Mirror, Published]]:
    with mirror_of(request.param, monkeypatch) as (mirror, stand_in):
        yield request.param, mirror, stand_in


def write(folder: Path, stand_in: Published, packed: bool = True) -> None:
    """The published files, or these unpacked."""
    for name, content in stand_in.files.items():
        (folder / name.removesuffix("" if packed else ".gz")).write_bytes(
            content if packed else gzip.decompress(content)
        )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK_NAME}


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-5],
    "empty": lambda content: b"",
    "too long": lambda content: content + b"more",
    "a web page": lambda content: b"<html>Please log in</html>",
}


@pytest.mark.parametrize("breaks", BREAK.values(), ids=BREAK)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stem", [IMAGES, LABELS])
def test_get_file_that_is_not_whole_is_named_and_downloaded_again(served, tmp_path, capfd, breaks, packed, stem):
    name, mirror, stand_in = served
    write(tmp_path, stand_in, packed)
    path = tmp_path / (stem + ".gz" * packed)
    whole = path.read_bytes()
    path.write_bytes(breaks(whole))
    get(name, tmp_path, verify=True)
    assert path.read_bytes() == whole
    assert mirror.requests == {f"{stem}.gz": 1}
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {path}: ") and said.endswith("; downloading it again\n") and said.count("\n") == 1


@pytest.mark.parametrize("breaks", [*BREAK.values(), lambda content: content[:-1] + b"\xfe"], ids=[*BREAK, "changed"])
def test_get_raw_file_is_not_that_of_the_archive_beside_it_is_unpacked_again(served, tmp_path, capfd, breaks):
    name, mirror, stand_in = served
    write(tmp_path, stand_in)
    whole = gzip.decompress(stand_in.files[f"{IMAGES}.gz"])
    (tmp_path / IMAGES).write_bytes(breaks(whole))
    get(name, tmp_path, verify=True)
    assert (tmp_path / IMAGES).read_bytes() == whole and not mirror.requests
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {tmp_path / IMAGES}: ") and said.endswith("; unpacking it again\n")
    assert (tmp_path / f"{IMAGES}.gz").read_bytes() == stand_in.files[f"{IMAGES}.gz"]


def test_get_both_forms_are_damaged_both_are_replaced(served, tmp_path, capfd):
    name, mirror, stand_in = served
    write(tmp_path, stand_in)
    (tmp_path / IMAGES).write_bytes(b"")
    (tmp_path / f"{IMAGES}.gz").write_bytes(stand_in.files[f"{IMAGES}.gz"][:-9])
    get(name, tmp_path, verify=True)
    assert (tmp_path / IMAGES).read_bytes() == idx(stand_in.splits["train"][0])
    assert (tmp_path / f"{IMAGES}.gz").read_bytes() == stand_in.files[f"{IMAGES}.gz"]
    assert mirror.requests == {f"{IMAGES}.gz": 1} and capfd.readouterr().err.count("downloading it again") == 2


@pytest.mark.parametrize("packed", [False, True])
def test_get_whole_files_are_left_and_nothing_is_written(served, tmp_path, capfd, packed):
    name, mirror, stand_in = served
    write(tmp_path, stand_in, packed)
    before = names(tmp_path)
    get(name, tmp_path, verify=True)
    assert not mirror.requests and capfd.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} == before, "no lock file either"


def test_get_archive_of_another_packer_is_left_and_said(served, tmp_path, capfd):
    name, mirror, stand_in = served
    write(tmp_path, stand_in)
    own = gzip.compress(idx(stand_in.splits["train"][0]), 1)
    (tmp_path / f"{IMAGES}.gz").write_bytes(own)
    get(name, tmp_path, verify=True)
    assert (tmp_path / f"{IMAGES}.gz").read_bytes() == own and not mirror.requests
    assert "is intact, but not the published file" in capfd.readouterr().err


def test_get_damaged_file_of_another_set_is_left(monkeypatch, tmp_path):
    with mirror_of("mnist", monkeypatch) as (mirror, stand_in):
        write(tmp_path, stand_in, packed=False)
        (tmp_path / LABELS).write_bytes(idx(stand_in.splits["t10k"][1][::-1].copy()))
        (tmp_path / IMAGES).write_bytes(b"half")
        with pytest.raises(UserError, match=rf"{IMAGES} is damaged, but .* has a dataset other than mnist"):
            get("mnist", tmp_path, verify=True)
        assert (tmp_path / IMAGES).read_bytes() == b"half" and not mirror.requests


def test_get_no_mirror_has_it_the_damaged_file_stays(served, tmp_path, capfd):
    name, mirror, stand_in = served
    write(tmp_path, stand_in, packed=False)
    (tmp_path / IMAGES).write_bytes(b"half")
    mirror.files.clear()
    with pytest.raises(UserError, match=f"{IMAGES}.gz could not be downloaded .*404"):
        get(name, tmp_path, verify=True)
    assert (tmp_path / IMAGES).read_bytes() == b"half"
    assert f"warning: {tmp_path / IMAGES}: " in capfd.readouterr().err


def test_get_without_verify_reads_no_file(served, tmp_path):
    name, mirror, stand_in = served
    write(tmp_path, stand_in, packed=False)
    (tmp_path / IMAGES).write_bytes(b"half")
    get(name, tmp_path)
    assert (tmp_path / IMAGES).read_bytes() == b"half" and not mirror.requests
