"""Checkpoint files: written atomically, verified when read, and free of code.

A checkpoint is a safetensors file. Its metadata holds JSON (`info`: step, epoch, settings, ...), a SHA-256 of that
JSON, and one of the JSON and all tensors, which loading verifies: a flipped bit is found, and nothing is unpickled.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Protocol, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from msgspec import Meta, Struct, convert

from dist_mnist.run.records import CheckpointInfo
from dist_mnist.utils.errors import UserError, short
from dist_mnist.utils.files import atomic_write, to_json
from dist_mnist.utils.schema import Count, parse

FORMAT = "dist_mnist/1"
MAX_HEADER = 1 << 20  # bytes; a typical header has a few thousand
# Bytes per number for the dtypes that safetensors and numpy share.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8,
    "F64": 8,
}  # fmt: skip


Value = TypeVar("Value")
Arrays = dict[str, np.ndarray]


class Tensor(Protocol):
    """The common interface of numpy arrays and torch tensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read completely and verified."""

    path: Path
    arrays: Arrays
    info: CheckpointInfo
    sha256: str  # of description and arrays


class TensorLayout(Struct, frozen=True):
    """A tensor's entry in the header of a safetensors file."""

    dtype: str
    shape: Annotated[tuple[Count, ...], Meta(max_length=64)]
    data_offsets: tuple[Count, Count]  # from the first byte after the header


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or not one of this package."""


class OtherVersion(CheckpointError):
    """Another version of this package wrote the checkpoint, or the character with the version is damaged."""


def save_checkpoint(path: Path, arrays: Arrays, info: CheckpointInfo) -> str:
    """Write named arrays and their description to `path`, atomically and durably; return the SHA-256 (hexadecimal).

    Raises:
        CheckpointError: `info` does not match its schema.
        OSError: the folder is not writable, or the disk is full; `path` is then unchanged.
    """
    arrays = {name: _plain(array) for name, array in arrays.items()}
    text = to_json(info)
    _parse_info(path, text)
    sha256 = _digest(arrays, text)
    metadata = {"format": FORMAT, "info": text, "info_sha256": _sha256(text), "sha256": sha256}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata))
    return sha256


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a whole checkpoint and verify it.

    Raises:
        CheckpointError: it is not a checkpoint of this package, or damaged.
        UserError: the file does not exist, or cannot be read from the disk.
    """
    with _open(path) as file:
        metadata = _metadata(path, file)
        file.seek(0)
        try:
            arrays = safetensors.numpy.load(file.read())
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise _damaged(path, str(error)) from None
        except OSError as error:
            raise _unreadable(path, error) from None
    if _digest(arrays, metadata["info"]) != metadata["sha256"]:
        raise _damaged(path, "its content does not match its SHA-256")
    return Checkpoint(path, arrays, _parse_info(path, metadata["info"]), metadata["sha256"])


def read_info(path: Path) -> CheckpointInfo:
    """Read and verify a checkpoint's description, without the tensors.

    Raises:
        CheckpointError, UserError: as `load_checkpoint`.
    """
    with _open(path) as file:
        return _parse_info(path, _metadata(path, file)["info"])


def _open(path: Path) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise CheckpointError(f"{path} is {kind}: give a checkpoint file")
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint or run directory") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _metadata(path: Path, file: BinaryIO) -> dict[str, str]:
    """Read the metadata from a safetensors header: eight bytes for its length, then JSON."""
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError("this is not a safetensors file")
        header = parse(file.read(length), dict[str, object])
        metadata = convert(header.pop("__metadata__", {}), dict[str, str])
        expected = 8 + length + _body_bytes(convert(header, dict[str, TensorLayout]))
        if (found_bytes := file.seek(0, 2)) != expected:
            raise ValueError(f"it has {found_bytes} bytes, not {expected}")
        found, lacking = metadata.get("format"), {"info", "info_sha256", "sha256"} - set(metadata)
        genuine = _sha256(metadata.get("info", "")) == metadata.get("info_sha256")
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise _damaged(path, f"its header cannot be read ({error})") from None
    if found and found != FORMAT and found.startswith(FORMAT.split("/")[0] + "/"):
        raise OtherVersion(
            f"{path} was written by another version of dist_mnist: its format is {short(repr(found))}, and this "
            f"version reads {FORMAT!r}; use the version that wrote it"
        )
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of dist_mnist: expected format {FORMAT!r}, found {short(repr(found))}"
        )
    if lacking:
        raise _damaged(path, f"it lacks its {' and '.join(sorted(lacking))}")
    if not genuine:
        raise _damaged(path, "its description does not match its SHA-256")
    return metadata


def _body_bytes(tensors: Mapping[str, TensorLayout]) -> int:
    """Return the total bytes of the tensors in a header; ValueError if they have gaps or overlaps."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.data_offsets):
        start, stop = tensor.data_offsets
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {short(repr(tensor.dtype))}")
        if start != end or stop - start != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
            raise ValueError("the offsets of its tensors do not match their shapes")
        end = stop
    return end


def _parse_info(path: Path, text: str) -> CheckpointInfo:
    try:
        return parse(text, CheckpointInfo)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its description does not match the schema of checkpoints, so it cannot be used: {error}"
        ) from None


def _plain(array: np.ndarray) -> np.ndarray:
    """Return the array in C order and the format's byte order."""
    return np.require(array, array.dtype.newbyteorder("<"), "C")


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or not a checkpoint: {short(how, 300)}")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): give a checkpoint file or a run directory")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def arrays_digest(arrays: Arrays) -> str:
    """Return the SHA-256 (hexadecimal) of names, dtypes, shapes and bits: equal for bitwise equal states."""
    return _digest(arrays, "")


def _digest(arrays: Arrays, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def part_of(values: Mapping[str, Value], part: str) -> dict[str, Value]:
    """Return the values named `<part>/...`, without this prefix."""
    return {name.removeprefix(f"{part}/"): value for name, value in values.items() if name.startswith(f"{part}/")}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Describe how arrays or tensors differ from the expected names, shapes and dtypes; None if they do not."""
    one, other = ({name: _kind(value) for name, value in values.items()} for values in (found, expected))
    if not (different := sorted(name for name in one | other if one.get(name) != other.get(name))):
        return None
    name = different[0]
    more = f" ({len(different) - 1} more differ)" if different[1:] else ""
    return f"{short(name)} should be {other.get(name, 'absent')}, but is {one.get(name, 'absent')}{more}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def evaluated_weights(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the weights of a checkpoint to evaluate: the EMA where there is one."""
    return part_of(values, "model") | part_of(values, "average")
