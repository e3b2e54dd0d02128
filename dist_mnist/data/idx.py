"""The idx format: a header with magic, dtype code and big-endian dimensions, followed by the array's bytes.

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
# Errors of file systems without memory maps, or with private ones only (FUSE with direct I/O).
NO_MAPS = (errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
MOST_UNPACKED = 1032  # deflate's largest compression ratio (zlib's technical details, https://zlib.net/zlib_tech.html)


class IdxError(UserError):
    """A file is not a valid idx file."""


@dataclass(frozen=True)
class Header:
    """The header of an idx file: dtype as stored (big-endian), shape, and offset of the body."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Size of the header in bytes."""
        return 4 + 4 * len(self.shape)

    @property
    def file_size(self) -> int:
        """Size of the whole (unpacked) file in bytes."""
        return self.offset + self.dtype.itemsize * math.prod(self.shape)

    def to_bytes(self) -> bytes:
        """Return the encoded header."""
        return bytes([0, 0, CODES[self.dtype], len(self.shape)]) + np.array(self.shape, ">u4").tobytes()


def read_header(path: Path) -> Header:
    """Read the header of an idx file, raw or gzip, regardless of its name.

    Raises:
        IdxError: the file is missing, unreadable, or its first bytes are not an idx header.
    """
    with _open(path, is_gzip(path)) as file:
        return _parse_header(file, path)


def is_gzip(path: Path) -> bool:
    """Whether a file starts with gzip's magic bytes; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(2) == GZIP_MAGIC
    except OSError:
        return False


def open_idx(path: Path) -> np.ndarray:
    """Map a raw idx file, read-only, in the file's dtype, without reading its body (but see `map_array`).

    Raises:
        IdxError: the header is invalid, or the file size does not match it.
    """
    header = read_header(path)
    size = path.stat().st_size
    if size != header.file_size:
        defect = "truncated" if size < header.file_size else "too long"
        raise IdxError(
            f"{path} is {defect}: its header declares {header.file_size} bytes (shape {header.shape}, "
            f"{header.dtype.name}), but the file has {size}; copy or download it again"
        )
    if 0 in header.shape:
        return np.empty(header.shape, header.dtype)  # mmap rejects a length of zero
    return map_array(path, header.dtype, header.shape, header.offset)


def map_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Map the array in a file, read-only. If the file system does not support it, read the file, and warn once.

    Raises:
        IdxError: the file cannot be read, or has shrunk meanwhile.
    """
    try:
        return np.memmap(path, dtype, "r", offset, shape, order)
    except OSError as error:
        if error.errno not in NO_MAPS:
            raise
        why = error.strerror
    try:  # a private map, whose pages are also shared unless written to
        array = np.memmap(path, dtype, "c", offset, shape, order)
        array.flags.writeable = False
        return array
    except OSError as error:
        if error.errno not in NO_MAPS:
            raise
    warn_once(
        f"mmap {path.stat().st_dev}",
        f"{path.parent}: this file system has no memory maps ({why}), so each process reads whole files into memory "
        f"({path.name}: {dtype.itemsize * math.prod(shape) / 1e6:,.1f} MB); with --stage-data, training maps copies on "
        "the node's local disk",
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
        raise IdxError(f"{path} has shrunk while it was read: restore the whole file and start again")
    array.flags.writeable = False
    return array.reshape(shape, order=order)


class Source:
    """The file that an array is mapped from. If the file shrinks, reading a missing page kills the process (SIGBUS).

    A check takes a microsecond. It misses only a file that is truncated during a gather.
    """

    def __init__(self, array: np.ndarray):
        self.path = getattr(array, "filename", None)
        base: Any = array
        while isinstance(base, np.ndarray):
            self.path = self.path or getattr(base, "filename", None)  # the array may be a view of a map
            base = base.base
        self._map = base if isinstance(base, mmap.mmap) else None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_map": None}  # pickling copies arrays, so there is no map to check

    def check(self) -> None:
        """Raise an IdxError if the file has shrunk since it was mapped."""
        if self._map is not None and (size := self._map.size()) < len(self._map):
            raise IdxError(
                f"{self.path} has shrunk while in use, from {len(self._map)} to {size} bytes: restore the whole file "
                "and start again; replace a file by renaming, not by overwriting"
            )


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write `array` (1 to 4 dimensions, an idx dtype in either byte order) as a raw idx file, atomically."""
    write_idx_chunks(path, array.dtype, array.shape, [array])


def write_idx_chunks(path: Path, dtype: np.dtype | type, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
    """Write an idx file of `shape` from successive chunks along its first axis, atomically.

    Raises:
        IdxError: idx does not support the dtype or the shape, or the chunks do not fill the shape.
    """
    stored = np.dtype(dtype).newbyteorder(">")
    if stored not in CODES or not 1 <= len(shape) <= MAX_DIMENSIONS or not all(0 <= d < 2**32 for d in shape):
        raise IdxError(f"{path}: idx does not support {stored.name} of shape {tuple(shape)}")
    header = Header(stored, tuple(int(d) for d in shape))
    with atomic_write(path) as file:
        file.write(header.to_bytes())
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=stored).data)
        if file.tell() != header.file_size:
            raise IdxError(f"{path}: chunks have {file.tell()} bytes, but shape {shape} needs {header.file_size}")


def unpack(source: Path, target: Path) -> None:
    """Unpack a gzip idx file to a raw one, atomically, with CRC check. An existing target is not replaced.

    Never writes more than the header declares: the first surplus byte is an error.

    Raises:
        IdxError: the gzip stream is damaged, or its content does not match the idx header.
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
                f"{source}: its header declares {header.file_size} bytes, its content has {found}; download it again"
            )


def stream_idx(file: IO[bytes], path: Path) -> tuple[Header, Iterator[np.ndarray]]:
    """Return the header of an (unpacked) idx stream, and its array in chunks of about 1 MB along the first axis.

    `path` is named in errors; the iterator also raises them.

    Raises:
        IdxError: the stream is damaged, or does not match the idx header.
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
                raise IdxError(f"{path} is truncated: its header declares the shape {header.shape}; download it again")
            yield np.frombuffer(content, header.dtype).reshape(rows, *row_shape)
        surplus = file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise IdxError(f"{path}: the gzip stream is damaged ({error}); download the file again") from None
    if surplus:
        raise IdxError(f"{path} is too long: its header declares the shape {header.shape}; download it again")


def _check_room(header: Header, source: Path, target: Path) -> None:
    """Raise an IdxError if gzip cannot hold the declared size, or the disk has no room for it."""
    packed_bytes, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if header.file_size > MOST_UNPACKED * packed_bytes:
        raise IdxError(
            f"{source}: its header declares {header.file_size} bytes (shape {header.shape}), which {packed_bytes} "
            "bytes of gzip cannot hold; download it again"
        )
    if header.file_size > free:
        raise IdxError(
            f"{source}: unpacking needs {header.file_size} bytes (shape {header.shape}), but {target.parent} has only "
            f"{free} free; free some space there"
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
            raise IdxError(f"{path} is not an idx file: it starts with {magic.hex(' ') or 'nothing'}, expected 00 00")
        if magic[2] not in DTYPES:
            known = ", ".join(f"0x{code:02x}" for code in DTYPES)
            raise IdxError(f"{path}: unknown idx dtype code 0x{magic[2]:02x}, expected one of {known}")
        if not 1 <= magic[3] <= MAX_DIMENSIONS:
            raise IdxError(f"{path}: an idx file has 1 to {MAX_DIMENSIONS} dimensions, this one declares {magic[3]}")
        sizes = file.read(4 * magic[3])
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise IdxError(f"{path}: the gzip stream is damaged ({error}); download the file again") from None
    except OSError as error:
        raise IdxError(f"{path}: cannot be read ({error.strerror})") from None
    if len(sizes) < 4 * magic[3]:
        raise IdxError(f"{path}: the file ends inside its header, after {4 + len(sizes)} bytes")
    header = Header(DTYPES[magic[2]], tuple(int(size) for size in np.frombuffer(sizes, ">u4")))
    if header.dtype.itemsize * math.prod(size for size in header.shape if size) >= 2**63:  # numpy's limit ignores zeros
        raise IdxError(f"{path}: its header declares the shape {header.shape}, which is too large for an array")
    return header
