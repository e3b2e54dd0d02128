"""The watchdog: each rank sends heartbeats with its phase and step, and one that stalls is named.

A thread of each rank writes a heartbeat into the store that formed the group, four times a second. Another checks its
own rank: when that makes no progress for the stall timeout, some rank holds it up. The one that has come least far, or
sends no heartbeat, is named, all Python stacks are dumped, and the rank leaves, however deep in a collective it is.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dist_mnist.distributed.world import World
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.elastic.progress import Progress
from dist_mnist.utils.clock import PhaseClock
from dist_mnist.utils.errors import STALLED

HEARTBEAT_S = 0.25
CHECK_S = 0.2
RENDEZVOUS = "rendezvous"  # the phase before the ranks know of each other
RENDEZVOUS_GRACE_S = 3.0
GRACE_S = 20.0  # from a stop request to its end, for a rank that is held up; torchrun and Slurm kill after 30
SILENCE_S = 30.0  # after which a rank that tells nothing is lost, though the stall timeout may be longer


@dataclass
class Heartbeat:
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


def ignore_phase(phase: str) -> None:
    """Nobody wants to know."""


class Stalled(RuntimeError):
    """No rank makes progress, because one of them stalls."""


class Watchdog:
    """Follows this rank's phases, and the others' once there is a store."""

    def __init__(self, world: World, stall_timeout_s: float, stop: StopSignal):
        self.world, self.stall_timeout_s, self.stop = world, stall_timeout_s, stop
        self.mine = Heartbeat(world.rank, socket.gethostname(), os.getpid())
        self.clock = PhaseClock(self.mine.phase)
        self.moved_at = time.monotonic()
        self._patience_s = min(stall_timeout_s, SILENCE_S) / 4  # after which it listens to the others
        self._launcher = os.getppid()
        self._others: dict[int, Heartbeat] = {}
        self._heard_at: dict[int, float] = {}
        self._store: Store | None = None
        self._store_answered_at = time.monotonic()
        self._progress = Progress(None)
        self.on_phase: Callable[[str], object] = ignore_phase  # is told each phase
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._check_progress, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what comes next; this is what counts as getting on."""
        mine = self.mine
        mine.phase, mine.step, mine.moves = phase, mine.step if step is None else step, mine.moves + 1
        self.moved_at = time.monotonic()
        self.clock.enter(phase, self.moved_at)
        self._progress.write(mine.step, phase)
        self.on_phase(phase)

    def keep_alive(self) -> None:
        """Say that a long phase, such as an evaluation, makes progress, so that it does not count as a stall."""
        self.enter(self.mine.phase)

    def write_progress_to(self, path: Path) -> None:
        """Keep step and phase in the file `path` as well, where they outlive this process."""
        self._progress = Progress(path)
        self.enter(self.mine.phase)

    @contextmanager
    def monitoring(self, store: Store | None) -> Iterator[None]:
        """Exchange heartbeats through `store` for the time of a `with` block; None where there is nobody else."""
        if store is None:
            yield
            return
        self._store, self._store_answered_at = PrefixStore("watchdog", store.clone()), time.monotonic()  # type: ignore[attr-defined]
        self._send()
        ending = threading.Event()
        thread = threading.Thread(target=self._send_heartbeats, args=(ending,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join(timeout=5)
            self._store = None

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _send_heartbeats(self, ending: threading.Event) -> None:
        assert self._store is not None
        with suppress(RuntimeError):  # the store has gone with its host: whoever waits for that rank will notice
            while not ending.wait(min(HEARTBEAT_S, self.stall_timeout_s / 5)):
                self._send()
                if self._held_up_s() > self._patience_s:
                    self._receive()
                self._store_answered_at = time.monotonic()

    def _send(self) -> None:
        assert self._store is not None
        self.mine.beats += 1
        self._store.set(str(self.mine.rank), json.dumps(asdict(self.mine)))

    def _receive(self) -> None:
        assert self._store is not None
        spoken = [str(rank) for rank in range(self.world.size) if self._store.check([str(rank)])]
        for text in self._store.multi_get(spoken):
            beat = Heartbeat(**json.loads(text))
            if beat.rank not in self._others or self._others[beat.rank].beats != beat.beats:
                self._heard_at[beat.rank] = time.monotonic()
            self._others[beat.rank] = beat

    def _held_up_s(self) -> float:
        return time.monotonic() - self.moved_at

    def _check_progress(self) -> None:
        looked_at = time.monotonic()
        while not self._closing.wait(CHECK_S):
            now = time.monotonic()
            if now - looked_at > 10 * CHECK_S:  # this process was stopped, and goes on; so may the others
                self.moved_at = now
                self._heard_at = dict.fromkeys(self._heard_at, now)
            looked_at = now
            asked_at = self.stop.noticed_at()
            if asked_at is not None and self.mine.phase == RENDEZVOUS:
                self._do_not_wait_in_vain(asked_at)
            late = asked_at is not None and time.monotonic() - max(asked_at, self.moved_at) > GRACE_S
            held_up_s = self._held_up_s()
            lost = self._store is not None and held_up_s > SILENCE_S and self._culprit()[1]
            if late or lost or held_up_s > self.stall_timeout_s:
                self._leave()

    def _do_not_wait_in_vain(self, asked_at: float) -> None:
        """Asked to stop before the ranks have met: they will agree on it, unless some never come."""
        launcher_is_gone = os.getppid() != self._launcher
        if launcher_is_gone or time.monotonic() - asked_at > RENDEZVOUS_GRACE_S:
            os.write(
                sys.stderr.fileno(),
                f"rank {self.mine.rank} ends: it got a stop request, and other ranks are gone\n".encode(),
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
            _kill(culprit, self._launcher)
        os._exit(STALLED)

    def _culprit(self) -> tuple[Heartbeat | None, str]:
        """The rank that holds the others up, None if it is none in particular, and what else is known of it."""
        patience_s = max(2.0, 2 * self._patience_s)
        if self._store is None or self.world.size == 1:
            return self.mine, ", waiting for ranks that have not come" if self.mine.phase == RENDEZVOUS else ""
        if time.monotonic() - self._store_answered_at > patience_s:
            return self._others.get(0, Heartbeat(0, "?", 0, "unknown")), ", which keeps the store and does not answer"
        silent = [rank for rank, at in self._heard_at.items() if time.monotonic() - at > patience_s]
        if silent:
            return self._others[min(silent)], ", which does not answer: it is stopped, or its node is lost"
        for rank in range(self.world.size):
            if rank not in self._others and rank != self.mine.rank:
                return Heartbeat(rank, "an unknown host", 0, "set-up"), ", which has sent no heartbeat yet"
        beats = [self.mine, *(beat for rank, beat in self._others.items() if rank != self.mine.rank)]
        places = [(beat.step, beat.moves) for beat in beats]
        return (None if len(set(places)) == 1 else beats[places.index(min(places))]), ""


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _kill(beat: Heartbeat, launcher: int) -> None:
    """End a rank of this run on this node that no longer answers, so that nobody waits for it."""
    with suppress(psutil.Error):
        process = psutil.Process(beat.pid)
        if process.ppid() == launcher:
            process.kill()
