"""The watchdog: each rank sends heartbeats with its phase and step, and a rank that stalls is named.

A thread of each rank writes a heartbeat into the store that formed the process group, four times a second. Another
thread checks its own rank. If that makes no progress for the stall timeout, it names the rank that has made the least
progress or sends no heartbeat, dumps all Python stacks, and ends its own rank, even inside a collective.
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
RENDEZVOUS = "rendezvous"  # the phase before the process group is formed
RENDEZVOUS_GRACE_S = 3.0
GRACE_S = 20.0  # from a stop request to the end of a rank that is blocked; torchrun and Slurm kill after 30
SILENCE_S = 30.0  # after which a rank without heartbeats is lost, even if the stall timeout is longer


@dataclass
class Heartbeat:
    """The state of a rank that it sends to the others."""

    rank: int
    host: str
    pid: int
    phase: str = "start"
    step: int = 0
    moves: int = 0  # phases entered so far: all ranks go through the same phases
    beats: int = 0

    def __str__(self) -> str:
        return f"{self.name()}, in phase '{self.phase}' at step {self.step}"

    def name(self) -> str:
        """Return rank, host and process id, in words."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def ignore_phase(phase: str) -> None:
    """Do nothing: the default `on_phase`."""


class Stalled(RuntimeError):
    """No rank makes progress, because one rank stalls."""


class Watchdog:
    """Monitors the phases of this rank, and those of the other ranks once there is a store."""

    def __init__(self, world: World, stall_timeout_s: float, stop: StopSignal):
        self.world, self.stall_timeout_s, self.stop = world, stall_timeout_s, stop
        self.mine = Heartbeat(world.rank, socket.gethostname(), os.getpid())
        self.clock = PhaseClock(self.mine.phase)
        self.moved_at = time.monotonic()
        self._patience_s = min(stall_timeout_s, SILENCE_S) / 4  # without progress, before it reads others' heartbeats
        self._launcher = os.getppid()
        self._others: dict[int, Heartbeat] = {}
        self._heard_at: dict[int, float] = {}
        self._store: Store | None = None
        self._store_answered_at = time.monotonic()
        self._progress = Progress(None)
        self.on_phase: Callable[[str], object] = ignore_phase  # called with each phase
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._check_progress, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase, at a new step if given; this counts as progress."""
        mine = self.mine
        mine.phase, mine.step, mine.moves = phase, mine.step if step is None else step, mine.moves + 1
        self.moved_at = time.monotonic()
        self.clock.enter(phase, self.moved_at)
        self._progress.write(mine.step, phase)
        self.on_phase(phase)

    def keep_alive(self) -> None:
        """Report progress within a long phase, such as an evaluation, so that it does not count as a stall."""
        self.enter(self.mine.phase)

    def write_progress_to(self, path: Path) -> None:
        """Write step and phase to the file `path` as well, which outlives this process."""
        self._progress = Progress(path)
        self.enter(self.mine.phase)

    @contextmanager
    def monitoring(self, store: Store | None) -> Iterator[None]:
        """Context manager: exchange heartbeats through `store`; None if there are no other ranks."""
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
        """Stop the thread that checks progress."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _send_heartbeats(self, ending: threading.Event) -> None:
        assert self._store is not None
        with suppress(RuntimeError):  # the store ended with its host, rank 0: ranks that wait for rank 0 will notice
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
            if now - looked_at > 10 * CHECK_S:  # this process was suspended and continues; so may the others
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
        """Handle a stop request during the rendezvous: ranks agree on it after that, unless some never arrive."""
        launcher_is_gone = os.getppid() != self._launcher
        if launcher_is_gone or time.monotonic() - asked_at > RENDEZVOUS_GRACE_S:
            os.write(
                sys.stderr.fileno(),
                f"rank {self.mine.rank} ends: it got a stop request, and other ranks are gone\n".encode(),
            )
            os._exit(1)

    def _leave(self) -> None:
        """Report the rank that stalls and this rank's stacks, and end this process, whatever it is doing."""
        held_up_s = self._held_up_s()
        culprit, why = self._culprit()
        who = f"{culprit}" if culprit else "no single rank, since all are at the same step: check their connection"
        if culprit and why and culprit is not self.mine:  # its last heartbeat may be older than its actual state
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
        """Return the rank that stalls, or None if no single rank does, and a clause for the error that says why."""
        patience_s = max(2.0, 2 * self._patience_s)
        if self._store is None or self.world.size == 1:
            return self.mine, ", waiting for ranks that have not arrived" if self.mine.phase == RENDEZVOUS else ""
        if time.monotonic() - self._store_answered_at > patience_s:
            return self._others.get(0, Heartbeat(0, "?", 0, "unknown")), ", which hosts the store and does not answer"
        silent = [rank for rank, at in self._heard_at.items() if time.monotonic() - at > patience_s]
        if silent:
            return self._others[min(silent)], ", which sends no heartbeat: it is suspended, or its node is lost"
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
    """Kill an unresponsive rank of this run on this node, so that no rank waits for it."""
    with suppress(psutil.Error):
        process = psutil.Process(beat.pid)
        if process.ppid() == launcher:
            process.kill()
