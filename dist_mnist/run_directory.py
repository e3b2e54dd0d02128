"""The run directory: who owns it, what was begun in it, which of its checkpoints to use and which to keep."""

import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dist_mnist.checkpoint import Arrays, CheckpointError, OtherVersion, load_checkpoint, read_info
from dist_mnist.errors import Shortage, UserError, warn
from dist_mnist.files import UNFINISHED, atomic_write, sync_folder, to_json
from dist_mnist.form import number, or_null, parse, string, whole
from dist_mnist.progress import read_progress

SAME_FAILURES = 2  # in a row, after which a restart would only meet the third

RUN_ID = "TORCHELASTIC_RUN_ID"  # torchrun's name of the rendezvous that decides who takes part; "none" if not given

OWNER = {"token": string, "run_id": or_null(string), "process": whole(1), "host": string}
FAILURES = {"step": number, "times": whole(0)}

Warn = Callable[[str], None]
Loaded = tuple[Path, Arrays, dict[str, Any]]


class TakenOver(Shortage):
    """Another process has become the owner of the run directory: this one may not write any more, but may join it."""


class RunDirectory:
    """The folder of one run: config.json, checkpoints/, tensorboard/, metrics.jsonl and result.json.

    Only rank 0 may call what writes, as its owner. An owner that lost its folder to another, because its machine was
    cut off and the run goes on without it, gets `TakenOver` from each of them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints_path = path / "checkpoints"
        self.tensorboard_path = path / "tensorboard"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.config_path = path / "config.json"
        self.stopped_path = path / "stopped.json"
        self.progress_path = path / ".progress"
        self._failures_path = path / ".failures"
        self._owner_path = path / ".owner"
        self._lock_path = path / ".lock"
        self._token: str | None = None  # while this process owns the folder

    @contextmanager
    def owned(self, wait_s: float = 5.0) -> Iterator[None]:
        """Make the folders and own them for a `with` block; the lock goes with the process, however it ends.

        An owner that is about to leave, because its torchrun was killed, is waited for. One that belongs to the same
        rendezvous and stays is not: the ranks have met again without it, so its machine stands still or is cut off.

        Raises:
            UserError: the folder cannot be made or written, or another run, which is named, is at work in it.
        """
        try:
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
            self._check_places()
            lock = self._acquire(wait_s)
            self._token = secrets.token_hex(8)
            owner = {"token": self._token, "run_id": _run_id(), "process": os.getpid(), "host": socket.gethostname()}
            with atomic_write(self._owner_path) as file:
                file.write(to_json(owner).encode())
        except OSError as error:
            raise UserError(
                f"{self.path}: the run directory cannot be written ({error.strerror}); give another --run-dir"
            ) from None
        try:
            yield
        finally:
            if self.owner_token() == self._token:
                self._owner_path.unlink(missing_ok=True)
            self._token = None
            lock.release()

    def remove_if_empty(self) -> None:
        """Take the folder away again, if nothing has been written into it but by `owned`."""
        if sorted(self.path.iterdir()) == [self._lock_path, self.checkpoints_path]:
            with suppress(OSError):  # there are checkpoints
                self.checkpoints_path.rmdir()
                self._lock_path.unlink()
                self.path.rmdir()

    def _check_places(self) -> None:
        """Nothing but files may stand where files are going to."""
        of_user = (self.metrics_path, self.result_path, self.config_path, self.stopped_path)
        for path in (*of_user, self.progress_path, self._failures_path, self._owner_path, self._lock_path):
            if os.path.lexists(path) and not path.is_file() and os.path.lexists(path):  # its owner may just be leaving
                raise UserError(f"{path} should be a file and is none: remove it, or give another --run-dir")

    def _acquire(self, wait_s: float) -> FileLock:
        lock = FileLock(self._lock_path, timeout=wait_s)
        try:
            lock.acquire()
        except Timeout:
            owner = self._owner()
            name = f" (process {owner['process']} on {owner['host']})" if owner else ""
            if not owner or owner["run_id"] is None or owner["run_id"] != _run_id():
                raise UserError(
                    f"{self.path}: another run is at work in this folder{name}; give another --run-dir"
                ) from None
            warn(f"{self.path} is taken over from its last owner{name}, which no longer takes part in the run")
            self._lock_path.unlink(missing_ok=True)  # what the last owner holds is no longer what others look at
            lock = FileLock(self._lock_path, timeout=wait_s)
            lock.acquire()
        return lock

    def _owner(self) -> dict[str, Any] | None:
        try:
            return parse(self._owner_path.read_bytes(), OWNER)
        except (OSError, ValueError):
            return None

    def owner_token(self) -> str | None:
        """What tells the folder's present owner from all others, as this machine sees it; None without one."""
        return (self._owner() or {}).get("token")

    def check_owner(self) -> None:
        """To be called before every write.

        Raises:
            TakenOver: this process was the owner, and another is now.
        """
        if self._token is None or (owner := self._owner()) is None or owner["token"] == self._token:
            return
        raise TakenOver(
            f"{self.path}: process {owner['process']} on {owner['host']} has taken this run over and goes on with it; "
            f"{socket.gethostname()} was cut off or stood still, and ends"
        )

    def begin_attempt(self) -> None:
        """Begin to run, for the first time or again.

        Raises:
            UserError: torchrun started this again, after the run had failed at the same step twice.
        """
        self.stopped_path.unlink(missing_ok=True)
        for folder in (self.path, self.checkpoints_path):
            for path in folder.glob(UNFINISHED):  # of a run that was killed while it wrote
                path.unlink()
        failures = {"step": -1, "times": 0}
        if (last := read_progress(self.progress_path)) and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            with suppress(OSError, ValueError):
                failures = parse(self._failures_path.read_bytes(), FAILURES)
            times = failures["times"] + 1 if failures["step"] == last[0] else 1
            failures = {"step": last[0], "times": times}
            if times >= SAME_FAILURES:
                raise UserError(
                    f"{self.path}: the run failed {times} times in a row at step {last[0]}, lastly in phase "
                    f"'{last[1]}': it is not started again; what was printed before says why"
                )
        self.write_json(self._failures_path, failures)

    def end_attempt(self, steps_done: int, signal: str | None) -> None:
        """Note that the run ended in order: finished, or stopped by a `signal`, which stopped.json tells others."""
        if signal:
            self.write_json(self.stopped_path, {"step": steps_done, "signal": signal})
        for path in (self.progress_path, self._failures_path):
            path.unlink(missing_ok=True)

    def started(self) -> dict[str, Any] | None:
        """What the newest checkpoint says of the run (`settings`, `data`, ...); None where there is none to go on from.

        A start that came to no checkpoint binds nobody.

        Raises:
            UserError: a checkpoint cannot be read from the disk.
        """
        for path in reversed(self.checkpoints()):
            try:
                return read_info(path)
            except CheckpointError:
                continue
        return None

    def write_json(self, path: Path, value: Any) -> None:
        """Write `value` to one of the run's JSON files."""
        self.check_owner()
        with atomic_write(path) as file:
            file.write(to_json(value, indent=2).encode() + b"\n")

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        found = self.checkpoints_path.glob("step-[0-9]*.safetensors")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps stands."""
        return self.checkpoints_path / f"step-{step:08}.safetensors"

    def newest(self, warn: Warn) -> tuple[Arrays, dict[str, Any]] | None:
        """The newest valid checkpoint's content; damaged ones are set aside by name and `warn` is told.

        Raises:
            UserError: a checkpoint cannot be read from the disk, which says nothing against it, or the only ones that
                can be are of another version.
        """
        found, damaged = None, {}
        for path in reversed(self.checkpoints()):
            try:
                found = load_checkpoint(path)
                break
            except CheckpointError as error:
                damaged[path] = error
        if found is None and (strange := [why for why in damaged.values() if isinstance(why, OtherVersion)]):
            raise strange[0]
        for path, why in damaged.items():
            path.rename(path.with_suffix(".damaged"))
            warn(f"{why}. It was set aside as {path.with_suffix('.damaged').name}.")
        return found

    def best(self, warn: Warn) -> Loaded:
        """The best valid checkpoint's path and content; `warn` is told of better ones that are damaged.

        Raises:
            CheckpointError: there is none.
        """
        for path in _ranked(self._accuracies(damaged=math.inf)):
            try:
                return path, *load_checkpoint(path)
            except UserError as error:
                warn(f"{error}. The next best is used.")
        raise CheckpointError(f"{self.path}: there is no valid checkpoint in its folder {self.checkpoints_path.name}/")

    def summary(self) -> list[dict[str, Any]]:
        """What the checkpoints say of themselves, oldest first, one JSON object each.

        Raises:
            CheckpointError: there is none.
        """
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: there is no such run directory")
        if not (ranked := _ranked(self._accuracies())):
            raise CheckpointError(f"{self.path}: there is no checkpoint in its folder {self.checkpoints_path.name}/")
        return [_summary(path, path == ranked[0]) for path in self.checkpoints()]

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest checkpoints and the best, unless which is that cannot be read now."""
        self.check_owner()
        accuracies = self._accuracies()
        if math.inf in accuracies.values():
            return
        for path in set(accuracies) - {*_ranked(accuracies)[:1], *list(accuracies)[-keep:]}:
            path.unlink()
        sync_folder(self.checkpoints_path)

    def _accuracies(self, damaged: float = -math.inf) -> dict[Path, float]:
        """Each checkpoint's validation accuracy, oldest first: -1 if there is none, inf if it cannot be read now."""
        return {path: _validation_accuracy(path, damaged) for path in self.checkpoints()}


def _run_id() -> str | None:
    """The rendezvous that this process belongs to, if torchrun was given a name for it."""
    run_id = os.environ.get(RUN_ID)
    return None if run_id in (None, "", "none") else run_id


def load_best(path: Path, warn: Warn) -> Loaded:
    """The checkpoint that `--ckpt` means, with its path: the file itself, or the best valid one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UserError: it cannot be read from the disk.
    """
    return RunDirectory(path).best(warn) if path.is_dir() else (path, *load_checkpoint(path))


def verify(path: Path) -> list[dict[str, Any]]:
    """Read a checkpoint file, or all of a run directory: for each its name and what is wrong with it, None if nothing.

    Raises:
        UserError: there is none, or one cannot be read from the disk.
    """
    paths = RunDirectory(path).checkpoints() if path.is_dir() else [path]
    if not paths:
        raise UserError(f"{path}: there is no checkpoint in its folder checkpoints/")
    return [{"file": path.name, "damage": _damage(path)} for path in paths]


def _damage(path: Path) -> str | None:
    try:
        load_checkpoint(path)
    except UserError as error:
        return str(error)
    return None


def _summary(path: Path, best: bool) -> dict[str, Any]:
    try:
        info = read_info(path)
    except UserError:
        info = {"step": None, "epoch": None, "validation": None}
    accuracy = (info["validation"] or {}).get("accuracy")
    facts = {name: info[name] for name in ("step", "epoch")}
    return {"file": path.name, **facts, "validation_accuracy": accuracy, "bytes": path.stat().st_size, "best": best}


def _validation_accuracy(path: Path, damaged: float) -> float:
    try:
        return (read_info(path)["validation"] or {}).get("accuracy", -1.0)
    except CheckpointError:
        return damaged
    except UserError:
        return math.inf


def _ranked(accuracies: dict[Path, float]) -> list[Path]:
    """Best first: by validation accuracy, of equals the latest; then those never validated, the latest first."""
    return sorted(reversed(accuracies), key=accuracies.__getitem__, reverse=True)  # sorting is stable
