"""The time of a process and of its phases."""

import subprocess
import sys
import time

import pytest

from dist_mnist.utils.clock import PhaseClock, duration, parse_duration, process_began_s
from helpers import HANGS_AFTER_S


def test_process_began_at_its_start_also_before_an_exec_and_a_fork():
    """The child first waits, then becomes another program, and tells of a fork, which have the same start."""
    second = (
        "import os, time; from dist_mnist.utils.clock import process_began_s; process_began_s(); time.sleep(0.3)\n"
        "if os.fork(): os.wait()\n"
        "else: print(time.monotonic() - process_began_s())"
    )
    first = f"import os, sys, time; time.sleep(0.3); os.execv(sys.executable, [sys.executable, '-c', {second!r}])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr
    assert 0.59 < float(done.stdout) < time.monotonic() - began + 0.02


def test_phase_clock_adds_up_phases_and_begins_with_the_process():
    now = time.monotonic()
    age = now - process_began_s()
    clock = PhaseClock("start")
    for phase, at in (("work", 1.0), ("rest", 3.0), ("rest", 3.5), ("work", 4.0), ("end", 8.0)):
        clock.enter(phase, now + at)
    seconds = clock.seconds()
    assert list(seconds) == ["start", "work", "rest", "end"]
    assert (seconds["work"], seconds["rest"]) == (pytest.approx(6.0), pytest.approx(1.0))
    assert seconds["start"] > age + 0.98  # a hundredth is not told
    assert sum(seconds.values()) > age - 0.02


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("0", 0),
        ("2h5s", 7205),
        ("0.5", 0.5),
        ("1e-06", 1e-6),
    ],
)
def test_duration_is_read_and_written_as_people_do(text, seconds):
    assert parse_duration(text) == seconds == parse_duration(duration(seconds))


@pytest.mark.parametrize("text", ["", "h", "1h30", "30 m", "1d", "-5s", "1m1h", "s", "1_0", "1e", "1e999", "9" * 400])
def test_duration_of_another_form_is_none(text):
    assert parse_duration(text) is None
