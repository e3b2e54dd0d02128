"""What bounds a run: a trace of a few of its steps, and one sentence (`--profile`).

Rank 0 lets its first steps pass, records some with torch's profiler, and then times further ones that nothing disturbs.
A step's time is shared out like this:

- input: the step waits for its batch (the phase `data`; on a GPU no more of it than the device is idle);
- communication: on CPUs the time spent in waiting for other ranks, on GPUs that in which only NCCL's kernels run;
- launch: nothing runs, neither a kernel on the GPU nor, on CPUs, an operator: Python and torch's dispatch are at work;
- computation: the rest.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dist_mnist.distributed.world import World
from dist_mnist.elastic.watchdog import Watchdog, ignore_phase
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.plan import Plan
from dist_mnist.training.metrics import Meter
from dist_mnist.utils.errors import warn

if TYPE_CHECKING:
    from torch.profiler import profile

WARM_UP, RECORDED, TIMED = 10, 5, 20  # steps; fewer of each in a short run
FEWEST = 3
NOTICEABLE = 0.2  # share of a step from which something else than computation bounds a run
STEP = (
    "data",
    "forward",
    "backward",
    "backward, all-reduce",
    "all-reduce",
    "optimizer",
    "graph",
)  # the phases of a step

Interval = tuple[float, float]


class Spans(NamedTuple):
    """When what ran in the recorded steps, in microseconds: start and end of each kernel, or operator on a CPU."""

    computing: list[Interval]
    communicating: list[Interval]
    whole: Interval


class Profile:
    """Follows the phases that a watch is told, from the beginning of a run to the last step that it needs."""

    def __init__(self, run: RunDirectory, meter: Meter, watchdog: Watchdog, say: Callable[[str], None], steps: range):
        self.folder, self.meter, self.timer = run.path / "profile", meter, meter.timer
        self.watchdog, self.say = watchdog, say
        third = len(steps) // FEWEST
        self.warm_up, self.recorded = min(WARM_UP, third), min(RECORDED, third)
        self.last = min(len(steps), self.warm_up + self.recorded + TIMED)
        self.first_recorded, self.begun = steps.start + self.warm_up, -1
        self.phase, self.since, self.waited = "", 0.0, 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.profiler: profile | None = None
        self.range: torch.profiler.record_function | None = None
        self.spans: Spans | None = None
        if len(steps) < FEWEST:
            warn(f"--profile needs {FEWEST} steps, and this run has {len(steps)} to go: there is no profile")
        else:
            watchdog.on_phase = self.enter

    def enter(self, phase: str) -> None:
        """A phase begins; a step begins with the phase `data`."""
        now, waited = time.perf_counter(), self.timer.seconds
        if self.spans and self.phase in STEP:
            self.seconds[self.phase] += now - self.since
            self.seconds["waiting"] += waited - self.waited
        if self.range:
            self.range.__exit__(None, None, None)
            self.range = None
        self.begun += phase == "data"
        if phase == "data" and self.begun == self.warm_up:
            with self.meter.paused():
                self._record()
        elif phase == "data" and self.begun == self.warm_up + self.recorded:
            with self.meter.paused():
                self._keep()
        elif self.begun == self.last:
            self.close()
        if self.profiler:
            self.range = torch.profiler.record_function(phase)
            self.range.__enter__()
        self.phase, self.since, self.waited = phase, time.perf_counter(), self.timer.seconds

    def close(self) -> None:
        """Say what was found, once there is something."""
        self.watchdog.on_phase = ignore_phase
        if self.profiler:  # the run ends before its time
            self._keep()
        if self.spans and sum(self.seconds.values()):
            found = shares(self.spans, self.seconds, on_gpu=self.meter.world.device.type == "cuda")
            self._write(lambda: (self.folder / "summary.json").write_text(json.dumps(found, indent=2) + "\n"))
            self.say(f"profile   {sentence(found)}")
            self.say(f"trace     {self.folder}: open it at ui.perfetto.dev, or by TensorBoard's profiler plugin")
            self.spans = None

    def _record(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of its start and end on the console
        on_gpu = self.meter.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        self.profiler = profile(activities=activities, acc_events=True)  # or torch 2.11 warns that it forgets events
        self.profiler.start()

    def _keep(self) -> None:
        assert self.profiler
        self.profiler.stop()
        trace = self.folder / f"rank0.step-{self.first_recorded:08}.pt.trace.json.gz"
        assert self.profiler is not None
        self._write(partial(self.profiler.export_chrome_trace, str(trace)))
        self.spans = _spans(self.profiler)
        self.profiler = None

    def _write(self, write: Callable[[], Any]) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            write()
        except OSError as error:
            warn(f"{self.folder}: the profile cannot be written ({error.strerror}); training goes on without")


def _spans(profiler: "profile") -> Spans:
    events = profiler.events() or []
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]  # but not our own names for parts of a step
    operators = [event for event in events if event.name.startswith("aten::")]
    steps = [event.time_range for event in events if event.name in STEP]
    nccl = [event for event in kernels if "nccl" in event.name.lower()]
    computing = [event for event in kernels or operators if event not in nccl]
    whole = min(span.start for span in steps), max(span.end for span in steps)
    return Spans(_intervals(computing), _intervals(nccl), whole)


def _intervals(events: list[Any]) -> list[Interval]:
    return [(event.time_range.start, event.time_range.end) for event in events]


def shares(spans: Spans, seconds: Mapping[str, float], on_gpu: bool) -> dict[str, Any]:
    """How a step's time is shared out, from recorded steps and the host's seconds by phase in others; JSON values."""
    length = spans.whole[1] - spans.whole[0]
    computing = covered(spans.computing) / length
    running = covered(spans.computing + spans.communicating) / length
    host = sum(spent for phase, spent in seconds.items() if phase != "waiting")
    phases = {phase: spent / host for phase, spent in seconds.items() if phase != "waiting"}
    data = phases.get("data", 0.0)
    if on_gpu:
        communication, idle = running - computing, 1 - running
        data = min(data, idle)
    else:
        communication, idle = seconds.get("waiting", 0.0) / host, 1 - computing
        idle -= min(idle, communication)
    launch = max(0.0, idle - data)
    parts = {"input": data, "communication": communication, "launch": launch}
    largest = max(parts, key=parts.__getitem__)
    bound_by = largest if parts[largest] >= NOTICEABLE else "computation"
    return {"bound_by": bound_by, **parts, "computation": 1 - sum(parts.values()), "host_phases": phases}


def sentence(found: dict[str, Any]) -> str:
    """What bounds the run, in words."""
    compute, wait, communicate, launch = (
        f"{found[name]:.1%}" for name in ("computation", "input", "communication", "launch")
    )
    phases = ", ".join(f"{phase} {part:.0%}" for phase, part in found["host_phases"].items())
    return (
        f"this run is bound by {found['bound_by']}: of a step it computes {compute}, waits for input {wait}, "
        f"communicates {communicate} and launches work {launch} (on the host: {phases})"
    )


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of some intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextmanager
def profiling(
    plan: Plan, world: World, watchdog: Watchdog, meter: Meter, say: Callable[[str], None], steps: range
) -> Iterator[None]:
    """Profile what happens in a `with` block on rank 0, if the run's settings ask for it."""
    if not (plan.config.profile and world.is_main):
        yield
        return
    with closing(Profile(plan.run, meter, watchdog, say, steps)):
        yield
