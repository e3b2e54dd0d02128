"""The idx format: what is written is read, byte for byte, and everything else is refused without leaving a trace."""

import gzip
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from hypothesis.strategies import binary, sampled_from

from dist_mnist.data.idx import IdxError, open_idx, read_header, unpack, write_idx, write_idx_chunks

KINDS = ["u1", "i1", "i2", "i4", "f4", "f8"]
SHAPES = [(7,), (3, 5), (4, 3, 2), (2, 3, 4, 2)]
HEADER = bytes.fromhex("00 00 08 02 00 00 00 02 00 00 00 03")  # uint8, 2 x 3
WHOLE = HEADER + bytes(range(6))

NO_HEADER = {
    "empty": (b"", "nothing"),
    "three bytes": (b"\0\0\x08", "not an idx file"),
    "wrong magic": (b"\x89PNG" + WHOLE, "starts with 89 50 4e 47"),
    "unknown dtype": (b"\0\0\x0a\x01\0\0\0\x01\0", "unknown idx dtype code 0x0a"),
    "no dimension": (b"\0\0\x08\0\0", "1 to 4 dimensions.* declares 0"),
    "five dimensions": (b"\0\0\x08\x05" + b"\0\0\0\x01" * 5 + b"\0", "1 to 4 dimensions.* declares 5"),
    "sizes beyond 2^63": (b"\0\0\x0e\x04" + b"\xff" * 16 + b"\0" * 8, r"\(4294967295, .*, which is too large"),
    "no bytes, of sizes beyond 2^63": (b"\0\0\x08\x04" + b"\xff" * 12 + b"\0" * 4, ", 0\\), which is too large"),
    "header cut off": (HEADER[:-1], "ends inside its header, after 11 bytes"),
}
WRONG_BODY = {
    "body too short": (WHOLE[:-1], "truncated.* 18 .* 17"),
    "body too long": (WHOLE + b"\0", "too long"),
}


def cases(table):
    return [pytest.param(*values, id=name) for name, values in table.items()]


def array_of(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values whose bytes all differ from their neighbours', with a negative one where the dtype has such."""
    values = np.arange(np.prod(shape)).reshape(shape) * 12345.678 - (0 if kind == "u1" else 40000)
    return values.astype("i8").astype(kind) if kind[-2] in "ui" else values.astype(kind)


@pytest.fixture
def packed(tmp_path):
    """A function that writes bytes as a gzip file."""

    def write(content: bytes):
        path = tmp_path / "x-idx2-ubyte.gz"
        path.write_bytes(gzip.compress(content))
        return path

    return write


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_idx_of_every_type_and_shape_is_read_as_written(tmp_path, kind, shape, order):
    array = array_of(kind, shape).astype(order + kind)
    write_idx(tmp_path / "x", array)
    found = open_idx(tmp_path / "x")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.dtype(">" + kind)
    assert (tmp_path / "x").read_bytes()[-array.nbytes :] == array.astype(">" + kind).tobytes()


@settings(max_examples=300, deadline=None)
@given(arrays(sampled_from(KINDS).map(np.dtype), array_shapes(max_dims=4, max_side=9, min_side=0)), sampled_from("<>"))
def test_idx_of_any_array_is_read_as_written(tmp_path_factory, array, order):
    path = tmp_path_factory.getbasetemp() / "anything-idx"
    write_idx(path, array.astype(array.dtype.newbyteorder(order)))
    found = open_idx(path)
    assert found.shape == array.shape and found.dtype.newbyteorder("=") == array.dtype
    assert found.tobytes() == array.astype(array.dtype.newbyteorder(">")).tobytes()  # NaNs too, bit for bit
    with gzip.open(packed := path.with_name("anything.gz"), "wb", 1) as file:
        file.write(path.read_bytes())
    unpack(packed, path)
    assert open_idx(path).tobytes() == found.tobytes()


@settings(max_examples=500, deadline=None)
@given(binary(max_size=40), sampled_from([b"", b"\0\0", b"\0\0\x08", b"\0\0\x0d\x02", HEADER]))
def test_open_idx_any_bytes_are_an_array_or_a_sentence(tmp_path_factory, rest, start):
    path = tmp_path_factory.getbasetemp() / "any-bytes-idx"
    path.write_bytes(start + rest)
    try:
        array = open_idx(path)
    except IdxError as error:
        assert str(path) in str(error)
    else:
        assert array.nbytes <= len(start + rest)


def test_write_idx_writes_the_published_bytes(tmp_path):
    write_idx(tmp_path / "x", np.array([[1, 258], [-1, -32768]], np.int16))
    assert (tmp_path / "x").read_bytes().hex() == "00000b02" + "00000002" * 2 + "0001" + "0102" + "ffff" + "8000"


def test_idx_of_no_values_is_read_as_written(tmp_path):
    write_idx(tmp_path / "x", np.empty((0, 28, 28), np.uint8))
    assert open_idx(tmp_path / "x").shape == (0, 28, 28)


def test_open_idx_gives_a_read_only_map(tmp_path):
    (tmp_path / "x").write_bytes(WHOLE)
    array = open_idx(tmp_path / "x")
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    with open(tmp_path / "x", "r+b") as file:  # it is the file, not a copy
        file.seek(len(HEADER))
        file.write(b"\x77")
    assert array[0, 0] == 0x77


@pytest.mark.parametrize("kind", KINDS)
def test_read_header_of_a_gzip_file_is_that_of_its_content(packed, tmp_path, kind):
    write_idx(tmp_path / "x", array_of(kind, (4, 3, 2)))
    header = read_header(packed((tmp_path / "x").read_bytes()))
    assert (header.dtype, header.shape) == (np.dtype(">" + kind), (4, 3, 2))
    assert (header.offset, header.file_size) == (16, (tmp_path / "x").stat().st_size)


@pytest.mark.parametrize(("content", "message"), cases(NO_HEADER | WRONG_BODY))
def test_open_idx_of_another_file_is_refused(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(IdxError, match=f"{tmp_path / 'x'}.*{message}"):
        open_idx(tmp_path / "x")


def test_open_idx_of_no_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent.gz", tmp_path):
        with pytest.raises(IdxError, match=f"{path}: cannot be read"):
            read_header(path)


@pytest.mark.parametrize(
    "array",
    [np.zeros(3, np.int64), np.zeros(3, np.uint16), np.zeros(3, np.complex64), np.float32(1), np.zeros((1,) * 5, "u1")],
    ids=["int64", "uint16", "complex64", "no dimension", "five dimensions"],
)
def test_write_idx_of_what_it_cannot_hold_is_refused(tmp_path, array):
    with pytest.raises(IdxError, match="idx does not support"):
        write_idx(tmp_path / "x", np.asarray(array))
    assert os.listdir(tmp_path) == []


def test_write_idx_of_chunks_makes_up_one_file(tmp_path):
    array = array_of("i4", (10, 3))
    write_idx_chunks(tmp_path / "x", np.int32, (10, 3), (array[i : i + 4] for i in (0, 4, 8)))
    np.testing.assert_array_equal(open_idx(tmp_path / "x"), array)


def test_write_idx_of_chunks_that_do_not_fill_the_shape_leaves_nothing(tmp_path):
    def broken():
        yield np.zeros((1, 3), np.uint8)
        raise KeyError("the source failed")

    for chunks, error in ((np.zeros((n, 1, 3), np.uint8), IdxError) for n in (0, 1, 3)):
        with pytest.raises(error, match="shape"):
            write_idx_chunks(tmp_path / "x", np.uint8, (2, 3), chunks)
    with pytest.raises(KeyError):
        write_idx_chunks(tmp_path / "x", np.uint8, (2, 3), broken())
    assert os.listdir(tmp_path) == []


def test_unpack_gives_the_content(packed, tmp_path):
    unpack(packed(WHOLE), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == WHOLE


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


ZIPPED = gzip.compress(WHOLE)
NOISE = np.random.default_rng(0).bytes(1 << 20)
DAMAGED = {
    "crc": (flip(ZIPPED, len(ZIPPED) - 8), "damaged"),
    "length": (flip(ZIPPED, len(ZIPPED) - 4), "damaged"),
    "last byte missing": (ZIPPED[:-1], "damaged"),
    "cut in two": (gzip.compress(HEADER[:4] + b"\0\1\0\0\0\0\0\x10" + NOISE)[: 1 << 19], "damaged"),
    "not gzip": (WHOLE, "damaged"),
    "no bytes": (b"", "nothing"),
    # Were it read on behind the announced size, the message would be that the stream is damaged.
    "goes on": (gzip.compress(WHOLE + NOISE)[: 1 << 19], "declares 18 bytes, its content has more"),
    "one byte more": (gzip.compress(WHOLE + b"\0"), "more"),
    "more than gzip can hold": (gzip.compress(b"\0\0\x08\x01\0\1\0\0" + b"\0" * 8), "65544 bytes .* gzip cannot hold"),
    "one byte fewer": (gzip.compress(WHOLE[:-1]), "1 fewer"),
} | {name: (gzip.compress(content), message) for name, (content, message) in NO_HEADER.items()}


@pytest.mark.parametrize(("content", "message"), cases(DAMAGED))
def test_unpack_of_what_is_not_whole_is_refused(tmp_path, content, message):
    source = tmp_path / "x.gz"
    source.write_bytes(content)
    with pytest.raises(IdxError, match=f"{source}.*{message}"):
        unpack(source, tmp_path / "x")
    assert os.listdir(tmp_path) == ["x.gz"]


def test_unpack_of_more_than_the_disk_holds_is_refused(packed, tmp_path, monkeypatch):
    source = packed(WHOLE)
    usage = shutil.disk_usage(tmp_path)._replace(free=len(WHOLE) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(IdxError, match=rf"{source}: unpacking needs 18 bytes .* {tmp_path} has only 17 free"):
        unpack(source, tmp_path / "x")
    assert os.listdir(tmp_path) == [source.name]


def test_unpack_that_fails_leaves_the_old_file(packed, tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(IdxError):
        unpack(packed(WHOLE + b"\0"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"old"
