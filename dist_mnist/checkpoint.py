"""The run directory and its checkpoints: written whole or not at all, verified when read, and free of code.

A checkpoint is one safetensors file. Its metadata holds JSON (`info`: step, epoch, settings, ...) and a SHA-256 over
that JSON and all tensors, which loading checks: a flipped bit is found, and nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from filelock import FileLock, Timeout

from dist_mnist.errors import UserError
from dist_mnist.files import atomic_write, sync_folder

FORMAT = "dist_mnist/1"

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
    text = json.dumps(info, sort_keys=True)
    metadata = {"format": FORMAT, "info": text, "sha256": _digest(arrays, text)}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata))


def load_checkpoint(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read a checkpoint whole and check it.

    Raises:
        CheckpointError: it cannot be read, is not ours, or its content is not what was written.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = _metadata(path, file.metadata())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from None
    if _digest(arrays, metadata["info"]) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256; use an older checkpoint")
    return arrays, _parse(path, metadata)


def read_info(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint alone, without reading its tensors and unverified.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return _parse(path, _metadata(path, file.metadata()))
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from None


def _metadata(path: Path, metadata: dict[str, str] | None) -> dict[str, str]:
    found = (metadata or {}).get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT!r}, found {found!r}")
    if missing := {"info", "sha256"} - set(metadata):
        raise CheckpointError(
            f"{path} is damaged: it lacks its {' and '.join(sorted(missing))}; use an older checkpoint"
        )
    return metadata


def _parse(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        return json.loads(metadata["info"])
    except ValueError as error:
        raise _unreadable(path, error) from None


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers in C order and the byte order of the format."""
    return np.require(array, array.dtype.newbyteorder("<"), "C")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as a checkpoint ({error}); use an older one, or copy it again")


def _digest(arrays: Arrays, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def part_of(values: Mapping[str, Value], part: str) -> dict[str, Value]:
    """The values named `<part>/...`, under their own names."""
    return {name.removeprefix(f"{part}/"): value for name, value in values.items() if name.startswith(f"{part}/")}


def evaluated_weights(values: Mapping[str, Value]) -> dict[str, Value]:
    """The weights of a checkpoint that are evaluated: the averaged ones where there are any."""
    return part_of(values, "model") | part_of(values, "average")


class RunDirectory:
    """The folder of one run: config.json, checkpoints/, tensorboard/, metrics.jsonl and result.json.

    Only rank 0 may call what writes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints_path = path / "checkpoints"
        self.tensorboard_path = path / "tensorboard"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.config_path = path / "config.json"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folders and own them for a `with` block; the lock goes with the process, however it ends.

        Raises:
            UserError: the folder cannot be made or written, or another run is at work in it.
        """
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UserError(f"{self.path}: another run is at work in this folder; give another --run-dir") from None
        except OSError as error:
            raise UserError(
                f"{self.path}: the run directory cannot be written ({error.strerror}); give another --run-dir"
            ) from None
        with lock:
            yield

    def write_json(self, path: Path, value: Any) -> None:
        """Write `value` to one of the run's JSON files."""
        with atomic_write(path) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")

    def read_config(self) -> dict[str, Any] | None:
        """What config.json holds: `settings`, `data` and `versions`; None where no run has begun.

        Raises:
            UserError: it cannot be read.
        """
        try:
            config = json.loads(self.config_path.read_text())
            if not isinstance(config["settings"], dict) or not isinstance(config["data"]["fingerprint"], str):
                raise ValueError("settings or data are of another kind")
            return config
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config_path} cannot be read ({error!r}): give another --run-dir") from None

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        found = self.checkpoints_path.glob("step-*.safetensors")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps stands."""
        return self.checkpoints_path / f"step-{step:08}.safetensors"

    def newest(self, warn: Callable[[str], None]) -> tuple[Arrays, dict[str, Any]] | None:
        """The newest valid checkpoint's content; damaged ones are set aside by name and `warn` is told."""
        for path in reversed(self.checkpoints()):
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                path.rename(path.with_suffix(".damaged"))
                warn(f"{error}. It was set aside as {path.with_suffix('.damaged').name}.")
        return None

    def best(self) -> Path:
        """The checkpoint with the highest validation accuracy, of equals the latest; the last if none was validated.

        Raises:
            CheckpointError: there is none.
        """
        paths = self.checkpoints()
        if not paths:
            raise CheckpointError(f"{self.path}: there is no checkpoint in its folder {self.checkpoints_path.name}/")
        return max(reversed(paths), key=_validation_accuracy)  # max takes the first of equals

    def summary(self) -> list[dict[str, Any]]:
        """What the checkpoints say of themselves, oldest first, one JSON object each.

        Raises:
            CheckpointError: there is none, or one cannot be read.
        """
        best = self.best()
        return [_summary(path, read_info(path), path == best) for path in self.checkpoints()]

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest checkpoints and the best."""
        spared = {self.best(), *self.checkpoints()[-keep:]}
        for path in set(self.checkpoints()) - spared:
            path.unlink()
        sync_folder(self.checkpoints_path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `--ckpt` means: the file itself, or the best of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_dir():
        return RunDirectory(path).best()
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint or run directory")
    return path


def _summary(path: Path, info: dict[str, Any], best: bool) -> dict[str, Any]:
    accuracy = (info["validation"] or {}).get("accuracy")
    facts = {name: info[name] for name in ("step", "epoch")}
    return {"file": path.name, **facts, "validation_accuracy": accuracy, "bytes": path.stat().st_size, "best": best}


def _validation_accuracy(path: Path) -> float:
    """As it was when the checkpoint was made; below all others if there is none, or the file cannot be read."""
    try:
        return (read_info(path)["validation"] or {}).get("accuracy", -1.0)
    except (CheckpointError, KeyError):
        return -2.0
