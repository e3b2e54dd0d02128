"""Who owns a run directory: one run at a time, by a lock that goes with its process, and a token that outlives it."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dist_mnist.run.records import Owner
from dist_mnist.utils.errors import Shortage, UserError, warn
from dist_mnist.utils.files import atomic_write, to_json
from dist_mnist.utils.schema import parse

RUN_ID = "TORCHELASTIC_RUN_ID"  # torchrun's name of the rendezvous that decides who takes part; "none" if not given


class TakenOver(Shortage):
    """Another process has become the owner of the run directory: this one may not write any more, but may join it."""


class Ownership:
    """The right to write into a folder. An owner that lost it, because its node was cut off and the run resumed without
    it, gets `TakenOver` from `check`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.owner_path = folder / ".owner"
        self.lock_path = folder / ".lock"
        self._token: str | None = None  # while this process owns the folder

    @contextmanager
    def held(self, wait_s: float) -> Iterator[None]:
        """Own the folder for a `with` block; the lock goes with the process, however it ends.

        An owner that is about to leave, because its torchrun was killed, is waited for. One that belongs to the same
        rendezvous and stays is not: the ranks have met again without it, so its node stands still or is cut off.

        Raises:
            UserError: another run, which is named, is at work in the folder.
            OSError: the folder cannot be written.
        """
        lock = self._acquire(wait_s)
        try:
            self._token = secrets.token_hex(8)
            owner = Owner(token=self._token, run_id=own_run_id(), process=os.getpid(), host=socket.gethostname())
            with atomic_write(self.owner_path) as file:
                file.write(to_json(owner).encode())
            yield
        finally:
            if self._token and self.token() == self._token:
                self.owner_path.unlink(missing_ok=True)
            self._token = None
            lock.release()

    def token(self) -> str | None:
        """What tells the folder's present owner from all others, as this node sees it; None without one."""
        owner = self._owner()
        return owner.token if owner else None

    def check(self) -> None:
        """To be called before every write.

        Raises:
            TakenOver: this process was the owner, and another is now.
        """
        if self._token is None or (owner := self._owner()) is None or owner.token == self._token:
            return
        raise TakenOver(
            f"{self.folder}: process {owner.process} on {owner.host} has taken this run over and resumed it; "
            f"{socket.gethostname()} was cut off or stood still, and ends"
        )

    def _acquire(self, wait_s: float) -> FileLock:
        lock = FileLock(self.lock_path, timeout=wait_s)
        try:
            lock.acquire()
        except Timeout:
            owner = self._owner()
            name = f" (process {owner.process} on {owner.host})" if owner else ""
            if not owner or owner.run_id is None or owner.run_id != own_run_id():
                raise UserError(
                    f"{self.folder}: another run is at work in this folder{name}; give another --run-dir"
                ) from None
            warn(f"{self.folder} is taken over from its last owner{name}, which no longer takes part in the run")
            self.lock_path.unlink(missing_ok=True)  # what the last owner holds is no longer what others look at
            lock = FileLock(self.lock_path, timeout=wait_s)
            lock.acquire()
        return lock

    def _owner(self) -> Owner | None:
        try:
            return parse(self.owner_path.read_bytes(), Owner)
        except (OSError, ValueError):
            return None


def own_run_id() -> str | None:
    """The rendezvous that this process belongs to, if torchrun was given a name for it."""
    run_id = os.environ.get(RUN_ID)
    return None if run_id in (None, "", "none") else run_id
