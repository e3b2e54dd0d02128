"""The checkpoints of a run: newest, best, retention, and damaged ones."""

import math
import re
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from dist_mnist.run.checkpoints.chain import Chain, fault_of, fault_of_result
from dist_mnist.run.checkpoints.file import (
    Arrays,
    Checkpoint,
    CheckpointError,
    OtherVersion,
    arrays_digest,
    load_checkpoint,
    read_info,
    save_checkpoint,
)
from dist_mnist.run.records import CheckpointInfo, read_run
from dist_mnist.utils.errors import UserError, os_error_as, warn
from dist_mnist.utils.files import sync_folder

RESULT = "result.json"
Warn = Callable[[str], None]
NAME = re.compile(r"step-(\d{8,})\.safetensors")
SPARSER = 4.0  # largest ratio of the ages of neighbouring checkpoints


class CheckpointRow(Struct, frozen=True, kw_only=True):
    """A line of `dist-mnist ckpt list`; `step` and `epoch` are None if the description cannot be read."""

    file: str
    step: int | None = None
    epoch: float | None = None
    validation_accuracy: float | None = None
    bytes: int
    best: bool


class Verification(Struct, frozen=True, kw_only=True):
    """The result of verifying a file: a description of its damage, or of the fault in its place in the chain."""

    file: str
    damage: str | None = None
    chain: str | None = None

    @property
    def fault(self) -> str | None:
        """The fault, if there is one."""
        return self.damage or self.chain


class CheckpointStore:
    """The checkpoint files in a run's folder `checkpoints/`, one for each saved step.

    `check_owner` is called before files are deleted; it raises if this process no longer owns the run directory.
    """

    def __init__(self, folder: Path, check_owner: Callable[[], None] = lambda: None):
        self.folder, self.check_owner = folder, check_owner
        self.chain = Chain(folder.parent)
        self._last: str | None = None  # digest of the next checkpoint's predecessor

    def paths(self) -> list[Path]:
        """Return the checkpoint files, oldest first."""
        found = self.folder.glob("step-[0-9]*.safetensors")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:08}.safetensors"

    def newest_info(self) -> CheckpointInfo | None:
        """Read the description of the newest valid checkpoint; None if there is none to resume from.

        A run that has no checkpoint yet does not constrain the next start.

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
        """Load the newest valid checkpoint; rename damaged ones, and `tell` of each.

        Raises:
            UserError: a checkpoint cannot be read from the disk, and so may be valid; or the only intact ones are of
                another version.
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
        with os_error_as(f"{self.chain.path} cannot be written", "give another --run-dir"):
            self.chain.set_aside_if_damaged(tell)
            if found:
                self._last = found.sha256
                self.chain.enter(found.sha256, found.info)  # its writer may have been killed before this
        return found

    def save(self, arrays: Arrays, info: CheckpointInfo) -> None:
        """Write a checkpoint and its link; its predecessor is the last one that was saved, or found as the newest.

        Raises:
            OSError: the folder is not writable, or the disk is full; nothing is left of the checkpoint then.
        """
        info = replace(info, parent=self._last, arrays_sha256=arrays_digest(arrays))
        self._last = save_checkpoint(self.path(info.step), arrays, info)
        self.chain.enter(self._last, info)

    def best(self, tell: Warn = warn) -> Checkpoint:
        """Load the best valid checkpoint, and `tell` of better ones that are damaged.

        Raises:
            CheckpointError: there is none.
        """
        for path in _ranked(self._accuracies(damaged=math.inf)):
            try:
                return load_checkpoint(path)
            except UserError as error:
                tell(f"{error}. The next best checkpoint is used.")
        raise CheckpointError(f"{self.folder.parent}: there is no valid checkpoint in its folder {self.folder.name}/")

    def summary(self) -> list[CheckpointRow]:
        """Return a row for each checkpoint, oldest first.

        Raises:
            CheckpointError: there is none.
        """
        if not self.folder.parent.is_dir():
            raise CheckpointError(f"{self.folder.parent}: there is no such run directory")
        if not (ranked := _ranked(self._accuracies())):
            raise CheckpointError(f"{self.folder.parent}: there is no checkpoint in its folder {self.folder.name}/")
        return [_summary(path, path == ranked[0]) for path in self.paths()]

    def prune(self, keep: int) -> None:
        """Delete the checkpoints that are not `kept`; none, if one cannot be read now, which may be the best.

        Files with other names are not deleted.
        """
        self.check_owner()
        accuracies = self._accuracies()
        if math.inf in accuracies.values():
            return
        paths = {int(name[1]): path for path in accuracies if (name := NAME.fullmatch(path.name))}
        best = {step for step, path in paths.items() if path in _ranked(accuracies)[:1]}
        for step in paths.keys() - kept(paths, keep, best):
            paths[step].unlink()
        sync_folder(self.folder)

    def _accuracies(self, damaged: float = -math.inf) -> dict[Path, float]:
        """Return each checkpoint's validation accuracy, oldest first: -1 without one, inf if it cannot be read now."""
        return {path: _validation_accuracy(path, damaged) for path in self.paths()}


def kept(steps: Collection[int], keep: int, best: Collection[int]) -> set[int]:
    """Return the `steps` of a run's checkpoints to keep: the `keep` newest, the `best`, the first, and of the others
    the fewer the older they are.

    From old to new, a checkpoint is dropped if its older neighbour is at most `SPARSER` times as old as its newer one.
    Age is the number of steps before the newest checkpoint. All ages grow by the same steps, so their ratios only fall:
    neighbours that are close enough stay so, however often this runs, and at any point of a run there is a checkpoint
    of a similar age. The neighbours of a kept checkpoint are further apart than that: with a factor of 4 from each to
    the next but one, about log2 of the number of saves are kept.
    """
    ordered = sorted(steps)
    protected = {*ordered[-keep:], *best}
    stay = ordered[:1]
    for step, newer in pairwise(ordered[1:]):
        if step in protected or ordered[-1] - stay[-1] > SPARSER * (ordered[-1] - newer):
            stay.append(step)
    return {*stay, *protected}


def store_of(run_dir: Path) -> CheckpointStore:
    """Return the checkpoints of a run directory, for reading."""
    return CheckpointStore(run_dir / "checkpoints")


def load_best(path: Path, tell: Warn = warn) -> Checkpoint:
    """Load the checkpoint for `--ckpt`: the file itself, or the best valid one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UserError: it cannot be read from the disk.
    """
    return store_of(path).best(tell) if path.is_dir() else load_checkpoint(path)


def verify(path: Path) -> list[Verification]:
    """Read and verify a checkpoint file, or all of a run directory, including the run's chain.

    Raises:
        UserError: there is no checkpoint, or chain.jsonl or result.json cannot be read.
    """
    if not path.is_dir():
        return [_verified(path, None)]
    store = store_of(path)
    if not (paths := store.paths()):
        raise UserError(f"{path}: there is no checkpoint in its folder checkpoints/")
    found = [_verified(checkpoint, store) for checkpoint in paths]
    if (path / RESULT).exists():
        found.append(Verification(file=RESULT, chain=fault_of_result(read_run(path).result, store.chain)))
    return found


def _verified(path: Path, store: CheckpointStore | None) -> Verification:
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        return Verification(file=path.name, damage=str(error))
    if store and path != store.path(checkpoint.info.step):
        return Verification(file=path.name, chain=f"its content is the checkpoint of step {checkpoint.info.step}")
    return Verification(file=path.name, chain=fault_of(checkpoint, store.chain) if store else None)


def _summary(path: Path, best: bool) -> CheckpointRow:
    row = CheckpointRow(file=path.name, bytes=path.lstat().st_size, best=best)
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
    """Sort by validation accuracy, best first; then those never validated. Among equals, the latest comes first."""
    return sorted(reversed(accuracies), key=accuracies.__getitem__, reverse=True)  # sorting is stable
