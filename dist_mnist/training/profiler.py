"""A profile of a few steps (`--profile`): a trace, and a line that names the bottleneck.

Rank 0 skips its first steps, records some with torch's profiler, and then times further steps without it. A step's time
is divided into:

- input: the step waits for its batch (the phase `data`; on a GPU at most the device's idle time);
- communication: time in collectives on CPUs; on GPUs, time of NCCL's kernels that other kernels do not overlap;
- launch: no kernel runs on the GPU, or no operator on the CPU: the time of Python and torch's dispatch;
- computation: the rest.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dist_mnist.distributed.collectives import CollectiveTimer
from dist_mnist.distributed.world import World
from dist_mnist.elastic.watchdog import Watchdog
from dist_mnist.run.plan import Plan
from dist_mnist.training.metrics import Meter
from dist_mnist.utils.errors import warn
from dist_mnist.utils.files import to_json

WARM_UP, RECORDED, TIMED = 10, 5, 20  # steps; fewer of each in a short run
FEWEST = 3
NOTICEABLE = 0.2  # fraction of a step from which something other than computation is the bottleneck
# The phases of a step.
STEP = ("data", "forward", "backward", "backward, all-reduce", "all-reduce", "optimizer", "graph")


@dataclass(frozen=True)
class Breakdown:
    """Fractions of a step's time by cause, and of the host's time by phase."""

    bound_by: str
    input: float
    communication: float
    launch: float
    computation: float
    host_phases: dict[str, float]

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {part:.0%}" for phase, part in self.host_phases.items())
        return (
            f"this run is bound by {self.bound_by}: a step spends {self.computation:.1%} on computation, "
            f"{self.input:.1%} waiting for input, {self.communication:.1%} on communication and {self.launch:.1%} on "
            f"launches (host: {phases})"
        )


def break_down(computing: float, communicating: float | None, seconds: Mapping[str, float], waited: float) -> Breakdown:
    """Divide a step's time.

    Args:
        computing: fraction of the recorded steps in which kernels run, on a CPU operators.
        communicating: fraction of the recorded steps in which NCCL's kernels run; None on a CPU.
        seconds: the host's time in the timed steps, by phase.
        waited: part of that time spent in collectives.
    """
    host = sum(seconds.values())
    phases = {phase: spent / host for phase, spent in seconds.items()}
    data = phases.get("data", 0.0)
    if communicating is None:
        communication = waited / host
    else:
        computing = min(computing, 1.0)
        communication = min(communicating, 1 - computing)
        data = min(data, 1 - computing - communication)
    launch = max(0.0, 1 - computing - communication - data)
    parts = {"input": data, "communication": communication, "launch": launch}
    largest = max(parts, key=parts.__getitem__)
    bound_by = largest if parts[largest] >= NOTICEABLE else "computation"
    return Breakdown(bound_by, **parts, computation=1 - sum(parts.values()), host_phases=phases)


class Profiler:
    """Follow the phases of a run by calls of `enter`, from the first of `steps` until there are enough.

    `timer` has the time spent in collectives so far; `paused()` is a context in which the run's metrics do not count
    time; `say` prints a line for the user. Files are written to `run_dir`/profile.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: range,
        device: torch.device,
        timer: CollectiveTimer,
        paused: Callable[[], AbstractContextManager[None]],
        say: Callable[[str], None],
    ):
        self.folder, self.timer, self.paused, self.say = run_dir / "profile", timer, paused, say
        third = len(steps) // FEWEST
        self.warm_up, recorded = min(WARM_UP, third), min(RECORDED, third)
        self.first_timed = self.warm_up + recorded
        self.last = min(len(steps), self.first_timed + TIMED)
        self.trace = self.folder / f"rank0.step-{steps.start + self.warm_up:08}.pt.trace.json.gz"
        self.on_gpu = device.type == "cuda"
        self.begun, self.phase, self.since = -1, "", (0.0, 0.0)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.waited = 0.0
        self.recorded: tuple[float, float | None] | None = None  # computing and communicating, for `break_down`
        self.range = ExitStack()  # the phase's name in the trace
        self.closed = not third
        if self.closed:
            warn(f"no profile: --profile needs {FEWEST} steps, and {len(steps)} are left in this run")
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages about its start and end on the console
        self.profiler = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu,
            schedule=schedule(wait=self.warm_up - 1, warmup=1, active=recorded, repeat=1),
            on_trace_ready=self._keep,
            acc_events=True,  # otherwise torch 2.11 warns that it drops events
        )

    def enter(self, phase: str) -> None:
        """Begin a phase; the phase `data` begins a step."""
        if self.closed:
            return
        if self.recorded and self.phase in STEP:
            self.seconds[self.phase] += time.perf_counter() - self.since[0]
            self.waited += self.timer.seconds - self.since[1]
        self.range.close()
        if phase == "data":
            self._begin_step()
        if self.warm_up <= self.begun < self.first_timed:
            self.range.enter_context(record_function(phase))
        self.phase, self.since = phase, (time.perf_counter(), self.timer.seconds)

    def close(self) -> None:
        """Report the result, if there is one. A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.range.close()
        self.profiler.stop()  # keeps what was recorded if the run ends early
        if self.recorded and self.seconds:
            found = break_down(*self.recorded, self.seconds, self.waited)
            self._write(lambda: (self.folder / "summary.json").write_text(to_json(found, indent=2) + "\n"))
            self.say(f"profile   {found}")
            self.say(f"trace     {self.folder}: open it at ui.perfetto.dev, or with TensorBoard's profiler plugin")

    def _begin_step(self) -> None:
        self.begun += 1
        if self.begun == self.last:
            self.close()
        elif self.begun in (0, self.warm_up - 1, self.warm_up, self.first_timed):  # the profiler starts or stops
            with self.paused():
                self.profiler.step() if self.begun else self.profiler.start()
        else:
            self.profiler.step()

    def _keep(self, recorded: profile) -> None:
        """Write the trace, and sum the profiler's times, in microseconds."""
        self._write(lambda: recorded.export_chrome_trace(str(self.trace)))
        averages = recorded.key_averages()
        length = sum(row.cpu_time_total for row in averages if row.key.startswith("ProfilerStep"))
        if self.on_gpu:
            kernels = [row for row in averages if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
            total = sum(row.self_device_time_total for row in kernels)
            nccl = sum(row.self_device_time_total for row in kernels if "nccl" in row.key.lower())
            self.recorded = (total - nccl) / length, nccl / length
        else:
            operators = sum(row.self_cpu_time_total for row in averages if row.key.startswith("aten::"))
            self.recorded = operators / length, None

    def _write(self, write: Callable[[], object]) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            write()
        except OSError as error:
            warn(f"{self.folder}: the profile cannot be written ({error.strerror}); training continues without it")


@contextmanager
def profiling(
    plan: Plan, world: World, watchdog: Watchdog, meter: Meter, say: Callable[[str], None], steps: range
) -> Iterator[None]:
    """Profile a `with` block on rank 0, if `--profile` is on."""
    if not (plan.config.profile and world.is_main):
        yield
        return
    with closing(Profiler(plan.run.path, steps, world.device, meter.timer, meter.paused, say)) as profiler:
        watchdog.on_phase = profiler.enter
        yield
