"""Ownership of a run directory, for one run at a time: by a lock that ends with its process, and by a token file."""

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
    "two runs that start here at the same moment are not detected, and a run on another node takes over the folder; a "
    "run that has lost its folder ends before it writes there again"
)
CLOCK_S = 2.0  # tolerance for the start time of the same process
LOOK_EVERY_S = 0.1
RUN_ID = "TORCHELASTIC_RUN_ID"  # torchrun's name of the rendezvous; "none" if not given


class TakenOver(Shortage):
    """Another process now owns the run directory: this one may not write any more, but may join that run."""


class Ownership:
    """The right to write into a folder. An owner that has lost it, because its node was disconnected and the run
    resumed without it, gets `TakenOver` from `check`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.owner_path = folder / ".owner"
        self.lock_path = folder / ".lock"
        self._token: str | None = None  # while this process owns the folder

    @contextmanager
    def held(self, wait_s: float) -> Iterator[None]:
        """Own the folder for a `with` block; the lock ends with the process in any case.

        An owner may be about to end, because its torchrun was killed: this waits `wait_s` seconds. If the owner is of
        the same rendezvous, this then takes over: the ranks have met without it, so its node stalls or is disconnected.

        On a file system without locks, only the token protects the folder. An owner's process on this node can be
        checked; from an owner on another node this takes over, and that one gets `TakenOver`.

        Raises:
            UserError: another run is using the folder; the message names it.
            OSError: the folder is not writable.
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
        """Return the token of the folder's current owner, as visible on this node; None without one."""
        owner = self._owner()
        return owner.token if owner else None

    def check(self) -> None:
        """Check the ownership; call this before every write.

        Raises:
            TakenOver: this process was the owner, and another one is now.
        """
        if self._token is None or (owner := self._owner()) is None or owner.token == self._token:
            return
        raise TakenOver(
            f"{self.folder}: process {owner.process} on {owner.host} has taken over this run and resumed it; the "
            f"process on {socket.gethostname()}, which was disconnected or stalled, ends"
        )

    def _lock(self, stack: ExitStack, wait_s: float) -> bool:
        """Lock the folder until the `stack` unwinds; return False if there are no locks."""
        try:
            return stack.enter_context(locked(self.lock_path, UNGUARDED, wait_s))
        except Timeout:
            self._take_over_in_same_rendezvous(self._owner())
            self.lock_path.unlink(missing_ok=True)  # the last owner's lock is on a file that others no longer open
            return stack.enter_context(locked(self.lock_path, UNGUARDED, wait_s))

    def _wait_for_end_of_owner(self, wait_s: float) -> None:
        """Wait until the owner's process has ended, on a file system without locks."""
        give_up_at = time.monotonic() + wait_s
        while (owner := self._owner()) and not _has_ended(owner):
            if time.monotonic() < give_up_at:
                time.sleep(LOOK_EVERY_S)
                continue
            if owner.host == socket.gethostname():
                self._take_over_in_same_rendezvous(owner)
            else:
                warn(f"{self.folder} is taken over from its last owner{_named(owner)}, which may have ended unnoticed")
            return

    def _take_over_in_same_rendezvous(self, owner: Owner | None) -> None:
        """Raise a UserError unless the current owner is of the same rendezvous as this process."""
        if not owner or owner.run_id is None or owner.run_id != own_run_id():
            raise UserError(
                f"{self.folder}: another run is using this folder{_named(owner)}; give another --run-dir"
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
    """Whether an owner on this node has ended; False for other nodes, where this cannot be checked."""
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
    """Return the name of this process's rendezvous, if torchrun was given one."""
    run_id = os.environ.get(RUN_ID)
    return None if run_id in (None, "", "none") else run_id
