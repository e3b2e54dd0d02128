"""Published arrays, read a chunk at a time: gzip idx files, by themselves or in a zip archive, and npz archives."""

import gzip
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from dist_mnist.data.idx import CHUNK, stream_idx
from dist_mnist.data.sources.known.records import Location
from dist_mnist.utils.errors import UserError, short

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # differs in the names of fields, which no number has
}
MAX_DIMENSIONS = 32  # of numpy's arrays
NO_PICKLE = (
    "it holds Python objects (a pickle), which could run code and are never loaded; save numeric arrays, with "
    "np.savez_compressed(file, x_train=..., y_train=..., x_test=..., y_test=...)"
)
PICKLED = b"\x80"  # the first byte of a pickle


class ArrayStream(NamedTuple):
    """An array that is read once: its shape, and chunks of it along the first axis."""

    shape: tuple[int, ...]
    chunks: Iterator[np.ndarray]


class NpyHeader(NamedTuple):
    """What the first bytes of an npy file announce."""

    shape: tuple[int, ...]
    is_fortran: bool  # whether the first axis varies fastest
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Of the array, which follow the header."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_npy_header(file: IO[bytes], where: str) -> NpyHeader:
    """Read the header of an array in numpy's format, up to where its bytes begin.

    Raises:
        UserError: there is none, it is damaged, no array can be what it announces, or that holds Python objects.
        OSError: the file cannot be read.
    """
    start = file.read(len(np.lib.format.MAGIC_PREFIX))
    if start != np.lib.format.MAGIC_PREFIX:
        raise UserError(f"{where}: {NO_PICKLE if start[:1] == PICKLED else 'this is no npy array'}")
    version = tuple(file.read(2))
    if version not in HEADERS:
        raise UserError(f"{where}: the array is damaged (version {version}); get the file again")
    try:
        header = NpyHeader(*HEADERS[version](file))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: the array is damaged ({short(error)}); get the file again") from None
    if header.dtype.hasobject:
        raise UserError(f"{where}: {NO_PICKLE}")
    extent = header.dtype.itemsize * math.prod(size for size in header.shape if size)  # numpy's limit, zeros aside
    if (
        len(header.shape) > MAX_DIMENSIONS
        or any(isinstance(size, bool) or size < 0 for size in header.shape)
        or not 0 < extent < 2**63
    ):
        announced = f"its header announces {header.dtype} {short(header.shape)}, which no array can have"
        raise UserError(f"{where}: the array is damaged ({announced}); get the file again")
    return header


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
            return _npy(file, str(name))
        header, chunks = stream_idx(cast(IO[bytes], gzip.GzipFile(fileobj=file)), name)
        return ArrayStream(header.shape, chunks)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}); download {path.name} again") from None


def _npy(file: IO[bytes], name: str) -> ArrayStream:
    """An array in numpy's format, from a stream.

    Raises:
        UserError: it is none, or not of numbers in C order.
    """
    header = read_npy_header(file, name)
    if header.is_fortran or not header.shape:
        raise UserError(f"{name}: {header.dtype} {header.shape} is not an array of numbers, row by row")
    return ArrayStream(header.shape, _npy_chunks(file, name, header.shape, header.dtype))


def _npy_chunks(file: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    step = max(1, CHUNK // max(row_bytes, 1))
    try:
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            if len(content := file.read(rows * row_bytes)) < rows * row_bytes:
                raise UserError(f"{name} is truncated: its shape is to be {shape}")
            yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error})") from None
