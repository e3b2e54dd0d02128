"""When the next checkpoint is due: by hand, or as what the last one cost allows."""

import threading
from contextlib import closing

import numpy as np
import pytest

from dist_mnist.config.settings import Config
from dist_mnist.run.directory import RunDirectory
from dist_mnist.training import async_saver
from dist_mnist.training.async_saver import AsyncSaver
from helpers import HANGS_AFTER_S
from helpers.checkpoints import INFO

COPY_S, WRITING_S = 0.01, 0.05
DEFAULT = Config()


class Clock:
    """In place of `time`: a copy of the state takes `copy_s`, and writing it `writing_s` of the thread's time."""

    def __init__(self, copy_s: float, writing_s: float):
        self.copy_s, self.writing_s = copy_s, writing_s
        self.now = self.computed = 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        self.computed += self.writing_s  # between the two readings
        return self.computed

    def state(self) -> dict[str, np.ndarray]:
        self.now += self.copy_s
        return {"w": np.zeros(3)}


@pytest.fixture
def saver_of(tmp_path, monkeypatch):
    """A function that makes a saver by a clock, in a run directory that we own."""
    run = RunDirectory(tmp_path / "run")

    def make(clock: Clock, config: Config = DEFAULT, shares_cores: bool = True) -> AsyncSaver:
        monkeypatch.setattr(async_saver, "time", clock)
        return AsyncSaver(run.checkpoints, clock.state, config, shares_cores)

    with run.owned():
        yield make


def due_after_s(saver: AsyncSaver, clock: Clock) -> float:
    """How long after the last save the next is due, to a hundredth of a second; infinity beyond two minutes."""
    began = clock.now
    for hundredths in range(12_000):
        clock.now = began + hundredths / 100
        if saver.overdue():
            return hundredths / 100
    return float("inf")


@pytest.mark.parametrize(
    ("copy_s", "writing_s", "shares_cores", "expected"),
    [
        (COPY_S, WRITING_S, True, 12.0),
        (COPY_S, WRITING_S, False, 5.0),  # the processor is there for the writing thread alone
        (0.1, WRITING_S, False, 20.0),
        (0.0, 0.0, True, 5.0),
        (3.0, 4.0, True, 60.0),
    ],
)
def test_overdue_by_default_follows_the_cost_of_the_last_save(saver_of, copy_s, writing_s, shares_cores, expected):
    clock = Clock(copy_s, writing_s)
    with closing(saver_of(clock, shares_cores=shares_cores)) as saver:
        clock.now = saver.saved_at
        assert due_after_s(saver, clock) == 5, "what a save costs is not known before the first"
        for _ in range(2):
            saver.save(INFO)
            saver.finish()
            assert due_after_s(saver, clock) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("every_s", "expected"), [(0.0, float("inf")), (2.0, 2.0), (100.0, 100.0)])
def test_overdue_by_hand_does_not_look_at_the_cost(saver_of, every_s, expected):
    clock = Clock(COPY_S, WRITING_S)
    with closing(saver_of(clock, Config(checkpoint_every_s=every_s))) as saver:
        saver.save(INFO)
        saver.finish()
        assert due_after_s(saver, clock) == pytest.approx(expected, abs=0.02)


def test_overdue_while_a_checkpoint_is_written_waits_for_its_end(saver_of):
    clock, may_write = Clock(COPY_S, WRITING_S), threading.Event()
    with closing(saver_of(clock)) as saver:
        saver.store.check_owner = lambda: may_write.wait(HANGS_AFTER_S)
        saver.save(INFO)
        assert due_after_s(saver, clock) == 60
        may_write.set()
        saver.finish()
        clock.now = saver.saved_at
        assert due_after_s(saver, clock) == pytest.approx(12, abs=0.02)


def test_overdue_after_a_save_that_failed_counts_what_it_cost(saver_of, capsys):
    def no_room() -> None:
        raise OSError(28, "No space left on device")

    clock = Clock(COPY_S, WRITING_S)
    with closing(saver_of(clock)) as saver:
        saver.store.check_owner = no_room
        saver.save(INFO)
        saver.finish(warn_only=True)
        assert due_after_s(saver, clock) == pytest.approx(12, abs=0.02)
    assert "No space left on device" in capsys.readouterr().err
