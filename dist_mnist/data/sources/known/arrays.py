"""Published arrays, read in chunks: gzip idx files, single or in a zip archive, and npz archives."""

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
    (3, 0): np.lib.format.read_array_header_2_0,  # differs only in field names, which numeric dtypes lack
}
MAX_DIMENSIONS = 32  # numpy's limit
NO_PICKLE = (
    "the file holds Python objects (a pickle), which could run code and are never loaded; save numeric arrays by "
    "np.savez_compressed(file, x_train=..., y_train=..., x_test=..., y_test=...)"
)
PICKLED = b"\x80"  # the first byte of a pickle


class ArrayStream(NamedTuple):
    """An array to read once: its shape, and chunks along the first axis."""

    shape: tuple[int, ...]
    chunks: Iterator[np.ndarray]


class NpyHeader(NamedTuple):
    """The header of an npy file."""

    shape: tuple[int, ...]
    is_fortran: bool  # whether the first axis varies fastest
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the array, which follows the header."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_npy_header(file: IO[bytes], where: str) -> NpyHeader:
    """Read the header of an npy array, up to the first byte of its content.

    Raises:
        UserError: the header is missing or damaged, declares an impossible array, or one of Python objects.
        OSError: the file cannot be read.
    """
    start = file.read(len(np.lib.format.MAGIC_PREFIX))
    if start != np.lib.format.MAGIC_PREFIX:
        raise UserError(f"{where}: {NO_PICKLE if start[:1] == PICKLED else 'the file is not an npy array'}")
    version = tuple(file.read(2))
    if version not in HEADERS:
        raise UserError(f"{where}: the array is damaged (version {version}); get the file again")
    try:
        header = NpyHeader(*HEADERS[version](file))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: the array is damaged ({short(error)}); get the file again") from None
    if header.dtype.hasobject:
        raise UserError(f"{where}: {NO_PICKLE}")
    extent = header.dtype.itemsize * math.prod(size for size in header.shape if size)  # numpy's limit ignores zeros
    if (
        len(header.shape) > MAX_DIMENSIONS
        or any(isinstance(size, bool) or size < 0 for size in header.shape)
        or not 0 < extent < 2**63
    ):
        declared = f"its header declares {header.dtype} {short(header.shape)}, which no array can have"
        raise UserError(f"{where}: the array is damaged ({declared}); get the file again")
    return header


@contextmanager
def open_array(location: Location, path: Path) -> Iterator[ArrayStream]:
    """Open the array at `location` in the file `path`, as a context manager.

    Raises:
        UserError: the file or the archive member is missing or damaged; the chunks may also raise it.
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
    """Open an npy array in a stream.

    Raises:
        UserError: it is not an npy array of numbers in C order.
    """
    header = read_npy_header(file, name)
    if header.is_fortran or not header.shape:
        raise UserError(f"{name}: expected an array of numbers in C order, got {header.dtype} {header.shape}")
    return ArrayStream(header.shape, _npy_chunks(file, name, header.shape, header.dtype))


def _npy_chunks(file: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    step = max(1, CHUNK // max(row_bytes, 1))
    try:
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            if len(content := file.read(rows * row_bytes)) < rows * row_bytes:
                raise UserError(f"{name} is truncated: its header declares the shape {shape}")
            yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error})") from None
