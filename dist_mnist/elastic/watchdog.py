"""Silence is not success: each rank publishes what it is doing, and one that stands still is named.

A thread of each rank tells the store that formed the group its phase and step, four times a second. Another looks after
its own rank: when that has not moved for the stall timeout, somebody holds it up. Whoever has come least far, or no
longer speaks, is named, all Python stacks are dumped, and the rank leaves, however deep in a collective it is.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dist_mnist.distributed.world import World
from dist_mnist.elastic.preemption import STOP
from dist_mnist.elastic.progress import Progress
from dist_mnist.utils.errors import STALLED

BEAT_S = 0.25
LOOK_S = 0.2
MEETING = "rendezvous"  # the phase before the ranks know of each other
MEETING_GRACE_S = 3.0
GRACE_S = 20.0  # from a request to stop to its end, for a rank that is held up; torchrun and Slurm kill after 30
SILENCE_S = 30.0  # after which a rank that tells nothing is lost, though the stall timeout may be longer
T = TypeVar("T")


@dataclass
class Beat:
    """What a rank tells of itself."""

    rank: int
    host: str
    pid: int
    phase: str = "start"
    step: int = 0
    moves: int = 0  # phases entered so far: all ranks go through the same ones
    beats: int = 0

    def __str__(self) -> str:
        return f"{self.name()}, in phase '{self.phase}' at step {self.step}"

    def name(self) -> str:
        """Which rank, where."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"


class Stalled(RuntimeError):
    """No rank gets on, because one of them stands still."""


class Watch:
    """Follows this rank's phases, and the others' once there is a store."""

    def __init__(self, world: World, stall_timeout_s: float):
        self.world, self.stall_timeout_s = world, stall_timeout_s
        self.mine = Beat(world.rank, socket.gethostname(), os.getpid())
        self.moved_at = time.monotonic()
        self._patience_s = min(stall_timeout_s, SILENCE_S) / 4  # after which it listens to the others
        self._launcher = os.getppid()
        self._others: dict[int, Beat] = {}
        self._heard_at: dict[int, float] = {}
        self._store: Store | None = None
        self._store_answered_at = time.monotonic()
        self._progress = Progress(None)
        self.on_enter: Callable[[str], object] = str  # is told each phase
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._look_after_myself, name="watch", daemon=True)]
        self._threads[0].start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what comes next; this is what counts as getting on."""
        mine = self.mine
        mine.phase, mine.step, mine.moves = phase, mine.step if step is None else step, mine.moves + 1
        self.moved_at = time.monotonic()
        self._progress.write(mine.step, phase)
        self.on_enter(phase)

    def move(self) -> None:
        """Say that the phase goes on: a long one, such as an evaluation, is then not taken for a stall."""
        self.enter(self.mine.phase)

    def fetching(self, steps: range, batches: Iterable[T]) -> Iterator[tuple[int, T]]:
        """Each step with its batch; fetching it is a phase."""
        waiting = iter(batches)
        for step in steps:
            self.enter("data", step)
            yield step, next(waiting)

    def record_in(self, path: Path) -> None:
        """Keep step and phase in the file `path` as well, where they outlive this process."""
        self._progress = Progress(path)
        self.enter(self.mine.phase)

    @contextmanager
    def over(self, store: Store | None) -> Iterator[None]:
        """Exchange beats through `store` for the time of a `with` block; None where there is nobody else."""
        if store is None:
            yield
            return
        self._store, self._store_answered_at = PrefixStore("watch", store.clone()), time.monotonic()  # type: ignore[attr-defined]
        self._speak()
        ending = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ending,), name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join(timeout=5)
            self._store = None

    def close(self) -> None:
        """End the threads."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _beat(self, ending: threading.Event) -> None:
        assert self._store is not None
        with suppress(RuntimeError):  # the store has gone with its host: whoever waits for that rank will notice
            while not ending.wait(min(BEAT_S, self.stall_timeout_s / 5)):
                self._speak()
                if self._held_up_s() > self._patience_s:
                    self._listen()
                self._store_answered_at = time.monotonic()

    def _speak(self) -> None:
        assert self._store is not None
        self.mine.beats += 1
        self._store.set(str(self.mine.rank), json.dumps(asdict(self.mine)))

    def _listen(self) -> None:
        assert self._store is not None
        spoken = [str(rank) for rank in range(self.world.size) if self._store.check([str(rank)])]
        for text in self._store.multi_get(spoken):
            beat = Beat(**json.loads(text))
            if beat.rank not in self._others or self._others[beat.rank].beats != beat.beats:
                self._heard_at[beat.rank] = time.monotonic()
            self._others[beat.rank] = beat

    def _held_up_s(self) -> float:
        return time.monotonic() - self.moved_at

    def _look_after_myself(self) -> None:
        looked_at = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = time.monotonic()
            if now - looked_at > 10 * LOOK_S:  # this process was stopped, and goes on; so may the others
                self.moved_at = now
                self._heard_at = dict.fromkeys(self._heard_at, now)
            looked_at = now
            asked_at = STOP.noticed_at()
            if asked_at is not None and self.mine.phase == MEETING:
                self._do_not_wait_in_vain(asked_at)
            late = asked_at is not None and time.monotonic() - max(asked_at, self.moved_at) > GRACE_S
            held_up_s = self._held_up_s()
            lost = self._store is not None and held_up_s > SILENCE_S and self._culprit()[1]
            if late or lost or held_up_s > self.stall_timeout_s:
                self._leave()

    def _do_not_wait_in_vain(self, asked_at: float) -> None:
        """Asked to stop before the ranks have met: they will agree on it, unless some never come."""
        launcher_is_gone = os.getppid() != self._launcher
        if launcher_is_gone or time.monotonic() - asked_at > MEETING_GRACE_S:
            os.write(
                sys.stderr.fileno(), f"rank {self.mine.rank} ends: it was asked to, and others are gone\n".encode()
            )
            os._exit(1)

    def _leave(self) -> None:
        """Name who holds us up, with our own stacks, and end this process from within whatever it is doing."""
        held_up_s = self._held_up_s()
        culprit, why = self._culprit()
        who = f"{culprit}" if culprit else "all ranks, which have come equally far: the connection between them"
        if culprit and why and culprit is not self.mine:  # its last words may be older than its place
            who = f"{culprit.name()}, last heard of in phase '{culprit.phase}' at step {culprit.step}"
        mine = "" if culprit is self.mine else f" This is {self.mine}."
        error = Stalled(f"no progress for {held_up_s:.0f} s; held up by {who}{why}.{mine}")
        text = f"error: {error}\nStacks of rank {self.mine.rank}:\n{_stacks()}"
        os.write(sys.stderr.fileno(), text.encode())
        get_error_handler().record_exception(error)
        if culprit and culprit.host == self.mine.host and culprit is not self.mine and why:
            _kill(culprit)
        os._exit(STALLED)

    def _culprit(self) -> tuple[Beat | None, str]:
        """The rank that holds the others up, None if it is none in particular, and what else is known of it."""
        patience_s = max(2.0, 2 * self._patience_s)
        if self._store is None or self.world.size == 1:
            return self.mine, ", waiting for ranks that have not come" if self.mine.phase == MEETING else ""
        if time.monotonic() - self._store_answered_at > patience_s:
            return self._others.get(0, Beat(0, "?", 0, "unknown")), ", which keeps the store and does not answer"
        silent = [rank for rank, at in self._heard_at.items() if time.monotonic() - at > patience_s]
        if silent:
            return self._others[min(silent)], ", which does not answer: it is stopped, or its machine is lost"
        for rank in range(self.world.size):
            if rank not in self._others and rank != self.mine.rank:
                return Beat(rank, "an unknown host", 0, "set-up"), ", which has not spoken yet"
        beats = [self.mine, *(beat for rank, beat in self._others.items() if rank != self.mine.rank)]
        places = [(beat.step, beat.moves) for beat in beats]
        return (None if len(set(places)) == 1 else beats[places.index(min(places))]), ""


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _kill(beat: Beat) -> None:
    """End a rank of this run on this machine that no longer answers, so that nobody waits for it."""
    with suppress(OSError):
        theirs = Path(f"/proc/{beat.pid}/environ").read_bytes().split(b"\0")
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        if f"RANK={beat.rank}".encode() in theirs and f"TORCHELASTIC_RUN_ID={run_id}".encode() in theirs:
            os.kill(beat.pid, signal.SIGKILL)
