"""Profiling, without a run: the phases of a loop in this process, and how a step's time is divided."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dist_mnist.distributed.collectives import CollectiveTimer
from dist_mnist.training.profiler import Breakdown, Profiler, break_down

PHASES = ("data", "forward", "backward", "optimizer")


class Loop:
    """A loop of `steps` under a profiler, which ends after `made` of them."""

    def __init__(self, run_dir: Path, steps: range, made: int | None = None):
        self.said: list[str] = []
        self.pauses = 0
        profiler = Profiler(run_dir, steps, torch.device("cpu"), CollectiveTimer(), self.paused, self.said.append)
        for _ in steps[:made]:
            for phase in PHASES:
                profiler.enter(phase)
                torch.ones(50, 50) @ torch.ones(50, 50)
        profiler.enter("checkpoint")
        profiler.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pauses += 1
        yield


def ranges(trace: Path) -> Counter[str]:
    """How often each phase is in a trace."""
    with gzip.open(trace, "rt") as file:
        names = Counter(event.get("name", "") for event in json.load(file)["traceEvents"])
    return Counter({phase: names[phase] for phase in PHASES})


@pytest.mark.parametrize(
    ("steps", "first", "recorded"),
    [(range(3), 1, 1), (range(9), 3, 3), (range(40), 10, 5), (range(40, 80), 50, 5), (range(1000), 10, 5)],
    ids=str,
)
def test_profiler_traces_some_steps_and_says_what_bounds_the_run(tmp_path, capfd, steps, first, recorded):
    loop = Loop(tmp_path, steps)
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        f"rank0.step-{first:08}.pt.trace.json.gz", "summary.json"
    }  # fmt: skip
    assert ranges(tmp_path / "profile" / f"rank0.step-{first:08}.pt.trace.json.gz") == dict.fromkeys(PHASES, recorded)
    found = Breakdown(**json.loads((tmp_path / "profile" / "summary.json").read_text()))
    assert loop.said[0] == f"profile   {found}" and len(loop.said) == 2
    assert found.host_phases.keys() == set(PHASES) and sum(found.host_phases.values()) == pytest.approx(1)
    assert found.communication == 0 and min(found.input, found.launch, found.computation) >= 0
    assert 0 < loop.pauses <= 4
    assert capfd.readouterr() == ("", "")


def test_profiler_of_two_steps_warns_that_there_is_no_profile(tmp_path, capfd):
    loop = Loop(tmp_path, range(2))
    assert "--profile needs 3 steps, and 2 are left" in capfd.readouterr().err
    assert not loop.said and not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("made", "files"), [(0, 0), (10, 0), (12, 1), (15, 1), (16, 2)])
def test_profiler_of_a_run_that_stops_early_keeps_what_there_is(tmp_path, made, files):
    """Ten steps to warm up, five recorded, one timed."""
    loop = Loop(tmp_path, range(100), made)
    assert len(list(tmp_path.glob("profile/*"))) == files
    assert bool(loop.said) == (files == 2)


def test_profiler_that_cannot_write_only_warns(tmp_path, capfd):
    (tmp_path / "profile").write_text("in the way")
    loop = Loop(tmp_path, range(40))
    assert "the profile cannot be written" in capfd.readouterr().err
    assert loop.said[0].startswith("profile   this run is bound by")


SECONDS = {"data": 1.0, "forward": 3.0, "backward": 5.0, "optimizer": 1.0}


@pytest.mark.parametrize(
    ("computing", "communicating", "data", "bound_by", "expected"),
    [
        (0.95, 0.0, 1.0, "computation", {"input": 0.05, "launch": 0, "communication": 0}),
        (0.5, 0.4, 1.0, "communication", {"input": 0.1, "launch": 0, "communication": 0.4}),
        (0.7, 0.4, 1.0, "communication", {"input": 0, "launch": 0, "communication": 0.3}),
        (0.4, 0.0, 1.0, "launch", {"input": 0.1, "launch": 0.5, "communication": 0}),
        (0.6, 0.0, 11.0, "input", {"input": 0.4, "launch": 0, "communication": 0}),
        (1.2, 0.1, 1.0, "computation", {"input": 0, "launch": 0, "communication": 0}),
    ],
)
def test_break_down_on_a_gpu_names_what_bounds_a_step(computing, communicating, data, bound_by, expected):
    """Waiting for input or for other ranks counts as far as the device is idle."""
    found = break_down(computing, communicating, {**SECONDS, "data": data}, waited=0.0)
    assert found.bound_by == bound_by and {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    assert found.input + found.communication + found.launch + found.computation == pytest.approx(1)


@pytest.mark.parametrize(
    ("computing", "data", "waited", "bound_by", "expected"),
    [
        (0.92, 1.0, 0.0, "computation", {"input": 0.1, "launch": 0, "communication": 0}),
        (0.6, 1.0, 0.0, "launch", {"input": 0.1, "launch": 0.3, "communication": 0}),
        (0.6, 1.0, 3.0, "communication", {"input": 0.1, "launch": 0, "communication": 0.3}),
        (0.6, 11.0, 0.0, "input", {"input": 11 / 20, "launch": 0, "communication": 0}),
    ],
)
def test_break_down_on_a_cpu_names_what_bounds_a_step(computing, data, waited, bound_by, expected):
    found = break_down(computing, None, {**SECONDS, "data": data}, waited)
    assert found.bound_by == bound_by and {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    assert found.input + found.communication + found.launch + found.computation == pytest.approx(1)
