"""Who owns a run directory: one run at a time, by a lock that goes with its process, and a token that outlives it."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from filelock import Timeout

from dist_mnist.run.records import Owner
from dist_mnist.utils.errors import Shortage, UserError, warn
from dist_mnist.utils.files import atomic_write, locked, to_json
from dist_mnist.utils.schema import parse

UNGUARDED = (
    "two runs that begin here at the same moment are not kept apart, and a run on another node takes this one over; a "
    "run that has lost its folder ends before it writes there again"
)
CLOCK_S = 2.0  # by which the start of one and the same process may seem to differ
LOOK_EVERY_S = 0.1
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

        Where the file system has no locks, its token alone guards the folder: of an owner's process on this node it is
        known whether it has ended; an owner on another node is taken over from, and gets `TakenOver`.

        Raises:
            UserError: another run, which is named, is at work in the folder.
            OSError: the folder cannot be written.
        """
        with ExitStack() as stack:
            if not self._lock(stack, wait_s):
                self._wait_for_end_of_owner(wait_s)
            try:
                self._token = secrets.token_hex(8)
                with atomic_write(self.owner_path) as file:
                    file.write(to_json(_this_process(self._token)).encode())
                yield
            finally:
                if self._token and self.token() == self._token:
                    self.owner_path.unlink(missing_ok=True)
                self._token = None

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

    def _lock(self, stack: ExitStack, wait_s: float) -> bool:
        """Whether the lock is held, until the `stack` unwinds; False if there are no locks."""
        try:
            return stack.enter_context(locked(self.lock_path, UNGUARDED, wait_s))
        except Timeout:
            self._take_over_in_same_rendezvous(self._owner())
            self.lock_path.unlink(missing_ok=True)  # what the last owner holds is no longer what others look at
            return stack.enter_context(locked(self.lock_path, UNGUARDED, wait_s))

    def _wait_for_end_of_owner(self, wait_s: float) -> None:
        """What takes the place of waiting for the lock, where there is none."""
        give_up_at = time.monotonic() + wait_s
        while (owner := self._owner()) and not _has_ended(owner):
            if time.monotonic() < give_up_at:
                time.sleep(LOOK_EVERY_S)
                continue
            if owner.host == socket.gethostname():
                self._take_over_in_same_rendezvous(owner)
            else:
                warn(f"{self.folder} is taken over from its last owner{_named(owner)}, which may have ended silently")
            return

    def _take_over_in_same_rendezvous(self, owner: Owner | None) -> None:
        """Raise a UserError unless the present owner is of the rendezvous that this process belongs to."""
        if not owner or owner.run_id is None or owner.run_id != own_run_id():
            raise UserError(
                f"{self.folder}: another run is at work in this folder{_named(owner)}; give another --run-dir"
            ) from None
        warn(f"{self.folder} is taken over from its last owner{_named(owner)}, which no longer takes part in the run")

    def _owner(self) -> Owner | None:
        try:
            return parse(self.owner_path.read_bytes(), Owner)
        except (OSError, ValueError):
            return None


def _this_process(token: str) -> Owner:
    process = psutil.Process()
    return Owner(
        token=token,
        run_id=own_run_id(),
        process=process.pid,
        host=socket.gethostname(),
        started_at=process.create_time(),
    )


def _has_ended(owner: Owner) -> bool:
    """Whether an owner on this node is gone; of those on other nodes nobody can tell."""
    if owner.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(owner.process)
        is_same = owner.started_at is None or abs(process.create_time() - owner.started_at) < CLOCK_S
        return not is_same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _named(owner: Owner | None) -> str:
    return f" (process {owner.process} on {owner.host})" if owner else ""


def own_run_id() -> str | None:
    """The rendezvous that this process belongs to, if torchrun was given a name for it."""
    run_id = os.environ.get(RUN_ID)
    return None if run_id in (None, "", "none") else run_id
