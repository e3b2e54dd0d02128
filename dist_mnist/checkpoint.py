"""A checkpoint's file: written whole or not at all, verified when read, and free of code.

It is one safetensors file. Its metadata holds JSON (`info`: step, epoch, settings, ...), a SHA-256 over that JSON, and
one over it and all tensors, which loading checks: a flipped bit is found, and nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from dist_mnist.errors import UserError
from dist_mnist.files import atomic_write, to_json

FORMAT = "dist_mnist/1"
MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format

Value = TypeVar("Value")
Arrays = dict[str, np.ndarray]


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another kind."""


def save_checkpoint(path: Path, arrays: Arrays, info: dict[str, Any]) -> None:
    """Write named arrays and JSON values to `path`, atomically and durably.

    Raises:
        OSError: the folder cannot be written, or the disk is full; then nothing is left at `path` that was not before.
    """
    arrays = {name: _plain(array) for name, array in arrays.items()}
    text = to_json(info)
    metadata = {"format": FORMAT, "info": text, "info_sha256": _sha256(text), "sha256": _digest(arrays, text)}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata))


def load_checkpoint(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read a checkpoint whole and check it.

    Raises:
        CheckpointError: it is not ours, or its content is not what was written.
        UserError: there is no such file, or the disk does not give it.
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
    return arrays, json.loads(metadata["info"])


def read_info(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, itself verified, without reading the tensors.

    Raises:
        CheckpointError, UserError: as `load_checkpoint`.
    """
    with _open(path) as file:
        return json.loads(_metadata(path, file)["info"])


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint or run directory") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _metadata(path: Path, file: BinaryIO) -> dict[str, str]:
    """The metadata in a safetensors file's header: eight bytes for its length, then JSON."""
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError("it does not begin as a safetensors file")
        header = json.loads(file.read(length)) if length else {}
        metadata = header.pop("__metadata__", None) or {}
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if (found_bytes := file.seek(0, 2)) != expected:
            raise ValueError(f"it has {found_bytes} bytes, not {expected}")
        found, lacking = metadata.get("format"), {"info", "info_sha256", "sha256"} - set(metadata)
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from None
    if found != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of ours: expected format {FORMAT!r}, found {found!r}")
    if lacking:
        raise _damaged(path, f"it lacks its {' and '.join(sorted(lacking))}")
    if _sha256(metadata["info"]) != metadata["info_sha256"]:
        raise _damaged(path, "its description does not match its SHA-256")
    return metadata


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers in C order and the byte order of the format."""
    return np.require(array, array.dtype.newbyteorder("<"), "C")


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or no checkpoint: {how}")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): give a checkpoint file or a run directory")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def arrays_digest(arrays: Arrays) -> str:
    """SHA-256 (hexadecimal) over names, dtypes, shapes and bits: equal for states that are equal bit for bit."""
    return _digest(arrays, "")


def _digest(arrays: Arrays, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def part_of(values: Mapping[str, Value], part: str) -> dict[str, Value]:
    """The values named `<part>/...`, under their own names."""
    return {name.removeprefix(f"{part}/"): value for name, value in values.items() if name.startswith(f"{part}/")}


def evaluated_weights(values: Mapping[str, Value]) -> dict[str, Value]:
    """The weights of a checkpoint that are evaluated: the averaged ones where there are any."""
    return part_of(values, "model") | part_of(values, "average")
