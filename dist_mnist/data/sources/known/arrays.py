"""Published arrays, read a chunk at a time: gzip idx files, by themselves or in a zip archive, and npz archives."""

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from dist_mnist.data.idx import CHUNK, stream_idx
from dist_mnist.data.sources.known.records import Location
from dist_mnist.utils.errors import UserError


class ArrayStream(NamedTuple):
    """An array that is read once: its shape, and chunks of it along the first axis."""

    shape: tuple[int, ...]
    chunks: Iterator[np.ndarray]


@contextmanager
def open_array(location: Location, path: Path) -> Iterator[ArrayStream]:
    """Open the array at `location`, whose file is `path`, for a `with` block.

    Raises:
        UserError: the file, or an archive's member, is not there or damaged; the chunks may raise it, too.
    """
    with ExitStack() as stack:
        yield _opened(stack, location, path)


def _opened(stack: ExitStack, location: Location, path: Path) -> ArrayStream:
    name = path
    try:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if path.suffix in (".npz", ".zip"):
            name = path / location.member
            member = location.member + (".npy" if path.suffix == ".npz" else "")
            file = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(member))
        if path.suffix == ".npz":
            return _npy(file, name)
        header, chunks = stream_idx(cast(IO[bytes], gzip.GzipFile(fileobj=file)), name)
        return ArrayStream(header.shape, chunks)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}); download {path.name} again") from None


def _npy(file: IO[bytes], name: Path) -> ArrayStream:
    """An array in numpy's format, from a stream.

    Raises:
        UserError: it is none, or not of numbers in C order.
    """
    try:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except ValueError as error:
        raise UserError(f"{name}: not an array of numpy's ({error})") from None
    if dtype.hasobject or is_fortran or not shape:
        raise UserError(f"{name}: {dtype} {shape} is not an array of numbers, row by row")
    return ArrayStream(shape, _npy_chunks(file, name, shape, dtype))


def _npy_chunks(file: IO[bytes], name: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, CHUNK // max(row_bytes, 1))
    try:
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            if len(content := file.read(rows * row_bytes)) < rows * row_bytes:
                raise UserError(f"{name} is truncated: its shape is to be {shape}")
            yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error})") from None
