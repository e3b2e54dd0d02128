"""The checkpoints of a run: the newest, the best, which to keep, which are damaged."""

import math
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from dist_mnist.run.checkpoint import Checkpoint, CheckpointError, OtherVersion, load_checkpoint, read_info
from dist_mnist.run.records import CheckpointInfo
from dist_mnist.utils.errors import UserError, warn
from dist_mnist.utils.files import sync_folder

Warn = Callable[[str], None]


class CheckpointRow(Struct, frozen=True, kw_only=True):
    """A line of `dist-mnist ckpt list`; `step` and `epoch` are None where the description cannot be read."""

    file: str
    step: int | None = None
    epoch: float | None = None
    validation_accuracy: float | None = None
    bytes: int
    best: bool


class Verification(Struct, frozen=True, kw_only=True):
    """What reading a checkpoint whole has shown: `damage` in words, None if there is none."""

    file: str
    damage: str | None


class CheckpointStore:
    """The checkpoint files in a run's folder `checkpoints/`, one for each saved step.

    `check_owner` is called before files are deleted; it raises where this process may not write any more.
    """

    def __init__(self, folder: Path, check_owner: Callable[[], None] = lambda: None):
        self.folder, self.check_owner = folder, check_owner

    def paths(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        found = self.folder.glob("step-[0-9]*.safetensors")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps stands."""
        return self.folder / f"step-{step:08}.safetensors"

    def newest_info(self) -> CheckpointInfo | None:
        """The description in the newest valid checkpoint; None where there is none to resume from.

        A start that came to no checkpoint binds nobody.

        Raises:
            UserError: a checkpoint cannot be read from the disk.
        """
        for path in reversed(self.paths()):
            try:
                return read_info(path)
            except CheckpointError:
                continue
        return None

    def newest(self, tell: Warn = warn) -> Checkpoint | None:
        """The newest valid checkpoint; damaged ones are set aside by name, and `tell` is told.

        Raises:
            UserError: a checkpoint cannot be read from the disk, which says nothing against it, or the only ones that
                can be are of another version.
        """
        found, damaged = None, {}
        for path in reversed(self.paths()):
            try:
                found = load_checkpoint(path)
                break
            except CheckpointError as error:
                damaged[path] = error
        if found is None and (strange := [why for why in damaged.values() if isinstance(why, OtherVersion)]):
            raise strange[0]
        for path, why in damaged.items():
            path.rename(path.with_suffix(".damaged"))
            tell(f"{why}. It was set aside as {path.with_suffix('.damaged').name}.")
        return found

    def best(self, tell: Warn = warn) -> Checkpoint:
        """The best valid checkpoint; `tell` is told of better ones that are damaged.

        Raises:
            CheckpointError: there is none.
        """
        for path in _ranked(self._accuracies(damaged=math.inf)):
            try:
                return load_checkpoint(path)
            except UserError as error:
                tell(f"{error}. The next best is used.")
        raise CheckpointError(f"{self.folder.parent}: there is no valid checkpoint in its folder {self.folder.name}/")

    def summary(self) -> list[CheckpointRow]:
        """A row for each checkpoint, oldest first.

        Raises:
            CheckpointError: there is none.
        """
        if not self.folder.parent.is_dir():
            raise CheckpointError(f"{self.folder.parent}: there is no such run directory")
        if not (ranked := _ranked(self._accuracies())):
            raise CheckpointError(f"{self.folder.parent}: there is no checkpoint in its folder {self.folder.name}/")
        return [_summary(path, path == ranked[0]) for path in self.paths()]

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest checkpoints and the best, unless which is that cannot be read now."""
        self.check_owner()
        accuracies = self._accuracies()
        if math.inf in accuracies.values():
            return
        for path in set(accuracies) - {*_ranked(accuracies)[:1], *list(accuracies)[-keep:]}:
            path.unlink()
        sync_folder(self.folder)

    def _accuracies(self, damaged: float = -math.inf) -> dict[Path, float]:
        """Each checkpoint's validation accuracy, oldest first: -1 if there is none, inf if it cannot be read now."""
        return {path: _validation_accuracy(path, damaged) for path in self.paths()}


def store_of(run_dir: Path) -> CheckpointStore:
    """The checkpoints of a run directory, for reading."""
    return CheckpointStore(run_dir / "checkpoints")


def load_best(path: Path, tell: Warn = warn) -> Checkpoint:
    """The checkpoint that `--ckpt` means: the file itself, or the best valid one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UserError: it cannot be read from the disk.
    """
    return store_of(path).best(tell) if path.is_dir() else load_checkpoint(path)


def verify(path: Path) -> list[Verification]:
    """Read a checkpoint file, or all of a run directory, whole.

    Raises:
        UserError: there is none, or one cannot be read from the disk.
    """
    paths = store_of(path).paths() if path.is_dir() else [path]
    if not paths:
        raise UserError(f"{path}: there is no checkpoint in its folder checkpoints/")
    return [Verification(file=path.name, damage=_damage(path)) for path in paths]


def _damage(path: Path) -> str | None:
    try:
        load_checkpoint(path)
    except UserError as error:
        return str(error)
    return None


def _summary(path: Path, best: bool) -> CheckpointRow:
    row = CheckpointRow(file=path.name, bytes=path.stat().st_size, best=best)
    try:
        info = read_info(path)
    except UserError:
        return row
    accuracy = info.validation.accuracy if info.validation else None
    return replace(row, step=info.step, epoch=info.epoch, validation_accuracy=accuracy)


def _validation_accuracy(path: Path, damaged: float) -> float:
    try:
        score = read_info(path).validation
    except CheckpointError:
        return damaged
    except UserError:
        return math.inf
    return score.accuracy if score else -1.0


def _ranked(accuracies: dict[Path, float]) -> list[Path]:
    """Best first: by validation accuracy, of equals the latest; then those never validated, the latest first."""
    return sorted(reversed(accuracies), key=accuracies.__getitem__, reverse=True)  # sorting is stable
