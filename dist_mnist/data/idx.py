"""The idx format: a header of magic, dtype code and big-endian dimensions, then the array's bytes.

Format description: http://yann.lecun.com/exdb/mnist/ ("The IDX file format"):

    0x00 0x00 <dtype code> <number of dimensions>  then one big-endian uint32 per dimension, then the body
"""

import errno
import gzip
import math
import mmap
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, cast

import numpy as np

from dist_mnist.utils.errors import UserError, os_error_as, warn_once
from dist_mnist.utils.files import atomic_write

DTYPES: dict[int, np.dtype] = {
    0x08: np.dtype(np.uint8),
    0x09: np.dtype(np.int8),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_DIMENSIONS = 4
GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20
# What a file system says that has no memory maps, or only private ones (FUSE with direct I/O).
NO_MAPS = (errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
MOST_UNPACKED = 1032  # bytes from one of deflate, at most (zlib's technical details, https://zlib.net/zlib_tech.html)


class IdxError(UserError):
    """A file is not what the idx format allows."""


@dataclass(frozen=True)
class Header:
    """What an idx file's first bytes promise: dtype as stored (big-endian), shape, and where the body begins."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Bytes before the body."""
        return 4 + 4 * len(self.shape)

    @property
    def file_size(self) -> int:
        """Bytes of the whole (unpacked) file."""
        return self.offset + self.dtype.itemsize * math.prod(self.shape)

    def to_bytes(self) -> bytes:
        """The header as it stands in a file."""
        return bytes([0, 0, CODES[self.dtype], len(self.shape)]) + np.array(self.shape, ">u4").tobytes()


def read_header(path: Path) -> Header:
    """Read the header of an idx file, raw or gzip, whatever it is called.

    Raises:
        IdxError: the file is missing, unreadable, or its first bytes are not an idx header.
    """
    with _open(path, is_gzip(path)) as file:
        return _parse_header(file, path)


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip does; False for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(2) == GZIP_MAGIC
    except OSError:
        return False


def open_idx(path: Path) -> np.ndarray:
    """Map a raw idx file, read-only, in the file's own dtype; no byte of the body is read (but see `map_array`).

    Raises:
        IdxError: the header is wrong, or the body's length is not what the header says.
    """
    header = read_header(path)
    size = path.stat().st_size
    if size != header.file_size:
        defect = "truncated" if size < header.file_size else "too long"
        raise IdxError(
            f"{path} is {defect}: its header announces {header.file_size} bytes (shape {header.shape}, "
            f"{header.dtype.name}), but it has {size}; copy or download it again"
        )
    if 0 in header.shape:
        return np.empty(header.shape, header.dtype)  # a mapping cannot have no bytes
    return map_array(path, header.dtype, header.shape, header.offset)


def map_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Map the array in a file, read-only; where the file system has no maps, it is read, and a warning says so once.

    Raises:
        IdxError: it cannot be read, or has become shorter meanwhile.
    """
    try:
        return np.memmap(path, dtype, "r", offset, shape, order)
    except OSError as error:
        if error.errno not in NO_MAPS:
            raise
        why = error.strerror
    try:  # a private map, whose pages are shared as well as long as nobody writes to them
        array = np.memmap(path, dtype, "c", offset, shape, order)
        array.flags.writeable = False
        return array
    except OSError as error:
        if error.errno not in NO_MAPS:
            raise
    warn_once(
        f"mmap {path.stat().st_dev}",
        f"{path.parent}: this file system has no memory maps ({why}), so each process reads its files into memory, "
        f"whole ({path.name}: {dtype.itemsize * math.prod(shape) / 1e6:,.1f} MB); with --stage-data, training maps "
        "copies on the node's own disk",
    )
    return _read_array(path, dtype, shape, offset, order)


def _read_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, order: Literal["C", "F"]
) -> np.ndarray:
    array = np.empty(math.prod(shape), dtype)
    with os_error_as(f"{path}: cannot be read"), open(path, "rb") as file:
        file.seek(offset)
        count = file.readinto(array.view(np.uint8).data)
    if count < array.nbytes:
        raise IdxError(f"{path} has become shorter while it was read: put the whole file back and start again")
    array.flags.writeable = False
    return array.reshape(shape, order=order)


class Source:
    """Watches the file that an array is mapped from: reading a mapped page that is no longer there ends a process.

    Asking takes a microsecond. Only a file that is cut off in the very moment of a gather is not noticed in time.
    """

    def __init__(self, array: np.ndarray):
        self.path = getattr(array, "filename", None)
        base: Any = array
        while isinstance(base, np.ndarray):
            self.path = self.path or getattr(base, "filename", None)  # of the map that this one is a view of
            base = base.base
        self._map = base if isinstance(base, mmap.mmap) else None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_map": None}  # another process gets copies of arrays

    def check(self) -> None:
        """Raise an IdxError if the file has become shorter since it was mapped."""
        if self._map is not None and (size := self._map.size()) < len(self._map):
            raise IdxError(
                f"{self.path} has become shorter while it was in use, from {len(self._map)} to {size} bytes: put the "
                "whole file back and start again; a new version of a file should replace it by renaming"
            )


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write `array` (1 to 4 dimensions, a dtype of the format in either byte order) as a raw idx file, atomically."""
    write_idx_chunks(path, array.dtype, array.shape, [array])


def write_idx_chunks(path: Path, dtype: np.dtype | type, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
    """Write an idx file of `shape` from arrays that follow one another along its first axis, atomically.

    Raises:
        IdxError: the dtype or the number of dimensions is not the format's, or the chunks do not fill the shape.
    """
    stored = np.dtype(dtype).newbyteorder(">")
    if stored not in CODES or not 1 <= len(shape) <= MAX_DIMENSIONS or not all(0 <= d < 2**32 for d in shape):
        raise IdxError(f"{path}: idx cannot hold {stored.name} of shape {tuple(shape)}")
    header = Header(stored, tuple(int(d) for d in shape))
    with atomic_write(path) as file:
        file.write(header.to_bytes())
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=stored).data)
        if file.tell() != header.file_size:
            raise IdxError(f"{path}: chunks came to {file.tell()} bytes where shape {shape} needs {header.file_size}")


def unpack(source: Path, target: Path) -> None:
    """Unpack a gzip idx file to a raw one, atomically and with its CRC checked; one that is there already stays.

    Never writes more than the header announces: a file that goes on beyond that is refused at the first byte too many.

    Raises:
        IdxError: the gzip stream is damaged, or its content is not exactly the idx file that its header announces.
    """
    with _open(source, packed=True) as packed, atomic_write(target, replace=False) as file:
        header = _parse_header(packed, source)
        _check_room(header, source, target)
        file.write(header.to_bytes())
        left = header.file_size - header.offset
        try:
            while left and (chunk := packed.read(min(CHUNK, left))):
                file.write(chunk)
                left -= len(chunk)
            surplus = packed.read(1)
        except (OSError, EOFError, zlib.error) as error:
            raise IdxError(f"{source}: the gzip stream is damaged ({error}); download the file again") from None
        if left or surplus:
            found = f"{left} fewer" if left else "more"
            raise IdxError(
                f"{source}: its header announces {header.file_size} bytes, its content has {found}; download it again"
            )


def stream_idx(file: IO[bytes], path: Path) -> tuple[Header, Iterator[np.ndarray]]:
    """The header of an (unpacked) idx stream, and its array in chunks along the first axis, about a megabyte each.

    `path` is named in errors, which the iterator raises, too.

    Raises:
        IdxError: the stream is damaged, or is not exactly the idx file that its header announces.
    """
    header = _parse_header(file, path)
    return header, _chunks(file, path, header)


def _chunks(file: IO[bytes], path: Path, header: Header) -> Iterator[np.ndarray]:
    total, row_shape = header.shape[0], header.shape[1:]
    row_bytes = header.dtype.itemsize * math.prod(row_shape)
    step = max(1, CHUNK // max(row_bytes, 1))
    try:
        for start in range(0, total, step):
            rows = min(step, total - start)
            if len(content := file.read(rows * row_bytes)) < rows * row_bytes:
                raise IdxError(f"{path} is truncated: its header announces the shape {header.shape}; download it again")
            yield np.frombuffer(content, header.dtype).reshape(rows, *row_shape)
        surplus = file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise IdxError(f"{path}: the gzip stream is damaged ({error}); download the file again") from None
    if surplus:
        raise IdxError(f"{path} is too long: its header announces the shape {header.shape}; download it again")


def _check_room(header: Header, source: Path, target: Path) -> None:
    """Before anything is written: may so many bytes be in the gzip file, and is there room for them?"""
    packed_bytes, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if header.file_size > MOST_UNPACKED * packed_bytes:
        raise IdxError(
            f"{source}: its header announces {header.file_size} bytes (shape {header.shape}), which {packed_bytes} "
            "bytes of gzip cannot hold; download it again"
        )
    if header.file_size > free:
        raise IdxError(
            f"{source}: unpacked it has {header.file_size} bytes (shape {header.shape}), and {target.parent} has room "
            f"for {free}; make room there"
        )


def _open(path: Path, packed: bool) -> IO[bytes]:
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if packed else open(path, "rb")
    except OSError as error:
        raise IdxError(f"{path}: cannot be read ({error.strerror})") from None


def _parse_header(file: IO[bytes], path: Path) -> Header:
    try:
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0":
            raise IdxError(f"{path}: not an idx file: it begins with {magic.hex(' ') or 'nothing'}, not with 00 00")
        if magic[2] not in DTYPES:
            known = ", ".join(f"0x{code:02x}" for code in DTYPES)
            raise IdxError(f"{path}: unknown idx dtype code 0x{magic[2]:02x}; known are {known}")
        if not 1 <= magic[3] <= MAX_DIMENSIONS:
            raise IdxError(f"{path}: an idx file has 1 to {MAX_DIMENSIONS} dimensions, this one announces {magic[3]}")
        sizes = file.read(4 * magic[3])
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise IdxError(f"{path}: the gzip stream is damaged ({error}); download the file again") from None
    except OSError as error:
        raise IdxError(f"{path}: cannot be read ({error.strerror})") from None
    if len(sizes) < 4 * magic[3]:
        raise IdxError(f"{path}: the file ends inside its header, after {4 + len(sizes)} bytes")
    header = Header(DTYPES[magic[2]], tuple(int(size) for size in np.frombuffer(sizes, ">u4")))
    if header.dtype.itemsize * math.prod(size for size in header.shape if size) >= 2**63:  # numpy's limit, zeros aside
        raise IdxError(f"{path}: its header announces the shape {header.shape}, which no array can have")
    return header
